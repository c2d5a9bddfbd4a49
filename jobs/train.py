"""Train the model, on GPUs where the job file says `train: {device: cuda}`: one stage of a run, after `clusters.py`.

    ray job submit --address http://127.0.0.1:8265 --working-dir jobs -- python train.py cohort.yaml

The job file is that of `run_cohort.py`, where it is described. What the stage has done already is not done again; where
a stage before it is not finished, the job fails with one line that names it.
"""

from __future__ import annotations

from run_cohort import main

if __name__ == "__main__":
    main("train")
