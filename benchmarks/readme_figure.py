"""The README's figure, from the records that `make report` left.

python benchmarks/readme_figure.py      # reads report/records.jsonl; writes docs/_static/readme.png and
benchmarks/results/report.jsonl
"""

from pathlib import Path

from bilevel_profiling import report
from bilevel_profiling.records import records_file

ROOT = Path(__file__).resolve().parent.parent

records = [entry for entry in records_file.read(ROOT / "report" / "records.jsonl") if entry.case == "hypercleaning"]
target = ROOT / "docs" / "_static" / "readme.png"
target.parent.mkdir(exist_ok=True)
report.write_png(records, target)
records_file.write(
    records_file.read(ROOT / "report" / "records.jsonl"), ROOT / "benchmarks" / "results" / "report.jsonl"
)
print(target)
