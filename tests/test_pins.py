"""Run ids are hashes of class and field names: a move or a new default must not change one, or results are lost."""

import afdslib.experiments  # noqa: F401  (every kind of run)
from afdslib import runs
from afdslib.studies import profiles
from afdslib.studies.comparison import Comparison
from afdslib.studies.sweep import Study


def test_a_dozen_ids_are_what_they_were():
    profile = profiles.get("imagenet32", "quick")
    study, comparison = Study(profile), Comparison(profile)
    configs = [
        study.source_run,
        study.afs_source_run,
        comparison.points.extended(),
        comparison.points.afs_source,
    ]
    configs += [study.transfer_run(c.regulariser, 0, budget=b) for c in profile.candidates for b in (1.0, 0.1)]
    assert [runs.run_id(config) for config in configs] == PINNED


def test_every_committed_run_hashes_to_its_own_name():
    records = [record for _, record in runs.records()]
    assert len(records) > 1000
    for record in records:
        assert runs.run_id(runs.from_json(record["config"])) == record["id"]


PINNED = [
    "2d78a4d8af2d", "97499084cb16", "48e8481dcec3", "97499084cb16", "e42a16d048f4", "a719fe9fe8d3",
    "e7daab68a50f", "1dcf699acf5f", "108580e9c2e1", "9bebb187873c", "bf4b2b2740fe", "d07f08b1cbc3",
]  # fmt: skip
