"""The run store: each training run is computed once, kept under a hash of its configuration, and resumed if killed."""

# isort: off
from afdslib.runs.config import RESULTS_VERSION, Config, added, from_json, needs, register, run_id, to_json, unhashed
from afdslib.runs.results import MODEL, Result, publish, records, seconds
from afdslib.runs.run import Run, environment
from afdslib.runs.store import Summary, busy, finished, folder, get_or_run, list_committed, list_runs, load_config
from afdslib.runs.store import lookup, remove, require_training, resume, show

__all__ = [
    "MODEL", "RESULTS_VERSION", "Config", "Result", "Run", "Summary", "added", "busy", "environment", "finished",
    "folder", "from_json", "get_or_run", "list_committed", "list_runs", "load_config", "lookup", "needs", "publish",
    "records", "register", "remove", "require_training", "resume", "run_id", "seconds", "show", "to_json", "unhashed",
]  # fmt: skip
