"""Settings: METHOD's defaults, two presets, and messages that name what is wrong."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from ndreamer_dist.errors import SettingsError
from ndreamer_dist.pipeline import plan
from ndreamer_dist.settings import Settings, StageSettings, parse_assignments, read_yaml


def test_the_paper_preset_is_the_method() -> None:
    s = Settings.build(preset="paper")
    assert (s.model.encoder, s.model.codebooks, s.model.codes, s.model.code_dim) == ((1024, 512, 512), 32, 1024, 8)
    assert (s.model.latent, s.model.decoder, s.model.temperature, s.model.latent_noise) == (256, (512, 1024), 0.01, 1)
    weights = (s.loss.reconstruction, s.loss.cosine, s.loss.kl, s.loss.independence, s.loss.dependence)
    assert weights == (1, 20, 0.005, 1000, 50)
    assert (s.loss.triplet, s.loss.margin, s.loss.triplet_pairs) == (5, 5, 15)
    assert (s.loss.neighbourhood, s.loss.neighbours, s.loss.sigma, s.loss.across) == (1, 20, 1, 20)
    assert (s.train.batch_size, s.train.epochs, s.train.passes, s.train.reset_every) == (1024, 100, 15, 30)
    assert (s.hvg.num_hvg, s.clusters.low_resolution, s.clusters.high_resolution) == (2000, 0.5, 7)
    assert (s.embed.dimensions, s.match.neighbours, s.cohort.min_group_cells) == (50, 1, 100)


def test_the_small_preset_is_small() -> None:
    s = Settings.build(preset="small")
    assert (s.model.encoder, s.model.codebooks, s.model.codes, s.model.latent) == ((256, 128, 128), 8, 256, 64)
    assert (s.model.decoder, s.hvg.num_hvg, s.train.batch_size, s.train.passes) == ((128, 256), 2000, 512, 3)
    assert s.clusters.iterations == 2


def test_overrides_win_over_the_file_and_the_file_over_the_preset() -> None:
    made = Settings.build(
        preset="small", config={"train": {"epochs": 7, "passes": 2}}, overrides=parse_assignments(["train.epochs=9"])
    )
    assert (made.train.epochs, made.train.passes, made.train.batch_size) == (9, 2, 512)


def test_settings_survive_yaml() -> None:
    made = Settings.build(preset="small", overrides={"cohort.batch_key": ["donor", "site"], "effects.store": "none"})
    assert Settings.build(config=yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param({"train.epoch": 3}, r"no setting 'train\.epoch'\. Did you mean 'train\.epochs'", id="misspelt"),
        pytest.param({"trian.epochs": 3}, r"no setting 'trian'\. Did you mean 'train'", id="misspelt_stage"),
        pytest.param({"train.epochs": 0}, r"'train\.epochs': .*greater than or equal to 1 \(found 0\)", id="range"),
        pytest.param({"train.batch_size": 100}, "must be a multiple of 64", id="whole_blocks"),
        pytest.param({"loss.cross_cluster": "maybe"}, "'published' or 'clusters'", id="choice"),
        pytest.param({"embed.tile_rows": 9999}, r"exceeds pack\.block_rows", id="tile_in_block"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_accepted(overrides: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.build(overrides=overrides)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"there are paper, small\. Did you mean 'small'"):
        Settings.build(preset="smal")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().train.epochs = 3  # type: ignore[misc]


def test_every_setting_says_whether_it_bears_on_the_result() -> None:
    for stage in Settings.model_fields.values():
        if isinstance(stage.annotation, type) and issubclass(stage.annotation, StageSettings):
            for name, field in stage.annotation.model_fields.items():
                assert isinstance(field.json_schema_extra, dict), name
                assert field.json_schema_extra["role"] in {"result", "how"}
                assert field.description


@pytest.mark.parametrize("text", ["epochs", "=3"])
def test_an_assignment_needs_a_name_and_a_value(text: str) -> None:
    with pytest.raises(SettingsError, match="--set takes"):
        parse_assignments([text])


def test_kept_genes_are_a_set_and_fit_among_the_modelled() -> None:
    made = [Settings.build(overrides={"hvg.keep": keep}) for keep in ("IFI6, ISG15", ["ISG15", "IFI6", "IFI6"])]
    assert made[0].hvg.keep == made[1].hvg.keep == ("IFI6", "ISG15")
    assert Settings.build().hvg.keep == Settings.build(overrides={"hvg.keep": "none"}).hvg.keep == ()
    with pytest.raises(SettingsError, match="keep names 3 genes, more than num_hvg"):
        Settings.build(overrides={"hvg.keep": "a,b,c", "hvg.num_hvg": 2})
    with pytest.raises(SettingsError, match=r"hvg\.by"):
        Settings.build(overrides={"hvg.by": "donor"})


def test_the_yaml_of_settings_says_what_each_is_and_which_bear_on_results() -> None:
    lines = Settings.build(preset="small").to_yaml().splitlines()
    for stage, field in Settings.model_fields.items():
        if not isinstance(field.default, StageSettings):
            continue
        below = lines[[line.startswith(f"{stage}:") for line in lines].index(True) + 1 :]
        for name, setting in type(field.default).model_fields.items():
            line = next(line for line in below if line.startswith(f"  {name}: "))
            role = setting.json_schema_extra["role"]  # type: ignore[index, call-overload]
            assert line.endswith(f"  # {'* ' if role == 'result' else ''}{setting.description}")


NAMES_IN_YAML = {
    "no": "no", "No": "No", "NO": "NO", "yes": "yes", "on": "on", "off": "off", "0": "0", "0.0": "0.0", "001": "001", "1e3": "1e3",
    "12:30": "12:30", "2020-01-01": "2020-01-01", "1_000": "1_000", "'no'": "no", "SEPT1": "SEPT1", "0.10": "0.10", "1.": "1.",
}  # fmt: skip


@pytest.mark.parametrize("written", NAMES_IN_YAML)
def test_names_in_yaml_are_what_is_written(written: str) -> None:
    told = read_yaml(f"cohort:\n  control: {written}\n  batch_key: [{written}, x]\nhvg:\n  keep: [{written}]\n", "text")
    made, name = Settings.build(config=told), NAMES_IN_YAML[written]
    assert (made.cohort.control, made.cohort.batch_key, made.hvg.keep) == (name, (name, "x"), (name,))
    assert Settings.build(overrides=parse_assignments([f"cohort.control={written}"])).cohort.control == name


@pytest.mark.parametrize(
    ("written", "value"), [("on", True), ("no", False), ("true", True), ("off", False), ("False", False)]
)
def test_yes_and_no_are_still_understood_where_they_are_meant(written: str, value: bool) -> None:
    assert Settings.build(overrides=parse_assignments([f"run.serial={written}"])).run.serial is value


def test_what_yaml_has_read_as_yes_or_no_is_to_be_quoted() -> None:
    with pytest.raises(SettingsError, match=r"setting 'cohort\.control': expected a name.*quote it \(found False\)"):
        Settings.build(config={"cohort": {"control": False}})
    assert Settings.build(config={"cohort": {"control": 0}}).cohort.control == "0"


@pytest.mark.parametrize(("groups", "neighbours"), [(1, 15), (8, 15), (16, 8), (40, 3), (500, 1)])
def test_denoised_averages_about_120_cells_of_a_condition(groups, neighbours):
    assert Settings().denoise.counted(groups) == neighbours
    assert Settings.build(overrides={"denoise.neighbours": 4}).denoise.counted(groups) == 4


def test_complete_settings_leave_no_place_for_a_configuration() -> None:
    with pytest.raises(SettingsError, match="give one of them"):
        plan("nowhere.h5ad", config={"train": {"epochs": 3}}, settings=Settings())
