"""The files of a launch's own folder: the job, what rank 0 tells, and of every rank its mark and its error."""

from __future__ import annotations

JOB, TOLD, MARK, ERROR = "job.json", "told.jsonl", "rank_{}.mark", "rank_{}.json"
