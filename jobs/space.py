"""Place cells in a matching space that needs no network, or not one alone: one stage of a run, before `match.py`.

    ray job submit --address http://127.0.0.1:8265 --working-dir jobs -- python space.py cohort.yaml

It is a stage of the runs whose job file names such a space: `embedding: harmony`, say. The job file is that of
`run_cohort.py`, where it is described. What the stage has done already is not done again; where a stage before it is not
finished, the job fails with one line that names it.
"""

from __future__ import annotations

from run_cohort import main

if __name__ == "__main__":
    main("space")
