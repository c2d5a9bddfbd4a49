"""Settings of any type and any YAML are read or refused in one line, and nothing in them is ever run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ndreamer_dist.errors import SettingsError
from ndreamer_dist.settings import Settings, read_yaml
from tests.fuzz.helpers import NAMES, SECONDS, command, planned, stored

pytestmark = pytest.mark.timeout(SECONDS)

KNOWN = [
    "seed",
    *(
        f"{stage}.{name}"
        for stage, field in Settings.model_fields.items()
        if stage != "seed"
        for name in field.annotation.model_fields
    ),
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def refusal_of(work: Callable[[], object]) -> str | None:
    """Return how some work is refused; none where it is not, and no other error is let through."""
    try:
        work()
    except SettingsError as error:
        return str(error)
    return None


@given(st.sampled_from(KNOWN), PLAIN)
@example(name="cohort.condition_key", value=[[]])
@settings(max_examples=150, deadline=2000)
def test_any_value_of_a_setting_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    refusal = refusal_of(lambda: Settings.build(overrides={name: value}))
    if refusal is not None:
        assert name.partition(".")[0] in refusal or "settings" in refusal
        assert len(refusal) < 1000
    else:
        made = Settings.build(overrides={name: value})
        assert Settings.build(config=yaml.safe_load(made.to_yaml())) == made


@given(st.dictionaries(st.sampled_from([*KNOWN, *Settings.model_fields]) | st.text(), PLAIN, max_size=4))
@settings(max_examples=100, deadline=2000)
def test_any_configuration_is_taken_or_refused(config: dict[Any, Any]) -> None:
    nested = {name.partition(".")[0]: value for name, value in config.items()}
    for given_as in ({"config": nested}, {"overrides": config}, {"config": nested, "overrides": config}):
        assert len(refusal_of(partial(Settings.build, **given_as)) or "") < 1000


@given(st.text() | st.text(alphabet="!&*[]{}:,-? \n\"'|>%@`#~0123456789.exTN_abnulfy", max_size=40))
@settings(max_examples=300, deadline=2000)
def test_any_text_is_plain_yaml_or_refused(text: str) -> None:
    assert (refusal_of(lambda: read_yaml(text, "here")) or "here ").startswith("here ")


RUNS_CODE = (
    "!!python/object/apply:os.system ['touch ran']", "!!python/object/apply:subprocess.check_output [[touch, ran]]",
    "!!python/object/new:os.system ['touch ran']", "!!python/name:os.system", "!!python/module:os",
    "!!python/object/apply:eval ['open(\"ran\", \"w\")']", "!!python/tuple [1, 2]",
    "!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval , ['open(\"ran\", \"w\")']]]",
)  # fmt: skip
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
)


@pytest.mark.parametrize("text", RUNS_CODE)
def test_yaml_runs_no_code(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    for body in (text, f"train: {text}", f"train:\n  epochs: {text}", f"? {text}\n: 1"):
        config.write_text(body)
        assert "cannot be read as plain YAML" in planned(stored("h5ad"), "--config", str(config)).refusal
    assert "cannot be read as plain YAML" in planned(stored("h5ad"), "--set", f"train.epochs={text}").refusal
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(BOMB, "there is no setting 'a0'", id="a_bomb_of_aliases"),
        pytest.param(f"{BOMB}\ntrain: {{epochs: *a11}}", "there is no setting", id="a_bomb_in_a_setting"),
        pytest.param(
            "train:\n  epochs: " + "&b [&c [&d [x, x, x, x], *d, *d, *d], *c, *c, *c]", "valid integer", id="nested_lists"
        ),
        pytest.param("&a [*a]", "expected settings by stage, found list", id="a_list_of_itself"),
        pytest.param("train: &a {epochs: *a}", "train.epochs", id="a_setting_of_itself"),
        pytest.param("[" * 20_000, "cannot be read as plain YAML", id="deep"),
        pytest.param("train: [1, 2]", "'train'", id="a_list_for_a_stage"),
        pytest.param("1: 2", "there is no setting '1'", id="a_number_for_a_stage"),
        pytest.param("train: {1: 2}", "train", id="a_number_for_a_name"),
        pytest.param("2020-01-01", "expected settings by stage, found str", id="a_date"),
        pytest.param("train: {epochs: 2020-99-99}", "valid integer", id="no_date"),
        pytest.param("train: {epochs: " + "9" * 5000 + "}", "cannot be read as plain YAML", id="a_number_of_5000_digits"),
        pytest.param("train: {epochs: " + "9" * 40 + "}", "at most 2147483647", id="a_huge_number"),
        pytest.param("train: {epochs: !!bool x}", "cannot be read as plain YAML", id="no_boolean"),
        pytest.param("train: {learning_rate: .inf}", "valid number", id="infinite"),
        pytest.param("model: {encoder: [64, 0]}", "greater than or equal to 1", id="a_layer_of_no_units"),
        pytest.param("", "found NoneType", id="empty"),
        pytest.param("\x00\x01", "cannot be read as plain YAML", id="not_text"),
        pytest.param("a: b: c", "cannot be read as plain YAML", id="not_yaml"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_will_not_do_is_refused(body: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(body)
    assert message in planned(stored("h5ad"), "--config", str(config)).refusal


def test_a_binary_or_absent_file_of_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    shutil.copy(stored("h5ad"), tmp_path / "cohort.yaml")
    for name in ("binary", "cohort.yaml", "none.yaml"):
        assert "cannot be read" in planned(stored("h5ad"), "--config", str(tmp_path / name)).refusal


@pytest.mark.parametrize(
    "assignment",
    ["", "=", "=3", "train", "train=3", "train.epochs=", "train.epochs=[", "train.epochs=2020-99-99", "a.b.c=1", ".=1",
     "train.=1", ".epochs=1", "seed=-1", "seed.x=1", "train.epochs.x=1", "x" * 10_000 + "=1", "train.epochs=!!int ''"],
    ids=lambda text: ascii(text)[:24],
)  # fmt: skip
def test_an_assignment_that_will_not_do_is_refused(assignment: str) -> None:
    assert planned(stored("h5ad"), "--set", assignment).refusal


def test_a_stage_given_as_a_number_and_a_setting_of_it_are_refused() -> None:
    assert "'train'" in planned(stored("h5ad"), "--set", "train=3", "--set", "train.epochs=5").refusal


def test_a_heading_with_nothing_below_it_is_fine(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("train:\nmodel:\n")
    assert planned(stored("h5ad"), "--config", str(config)).code == 0


@given(
    words=st.lists(
        st.sampled_from(
            ["plan", "run", "info", "get", "--out", "--set", "--config", "--preset", "x", "", "-", "--", "..", *NAMES]
        )
        | st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8),
        max_size=7,
    )
)
@settings(max_examples=30, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_end_with_a_usage_or_a_refusal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = command(words)
    assert told.code in (0, 2), told.err
    assert "Traceback" not in told.err
