"""What is committed of the studies is what their files say, and README tells the same."""

import json
import shutil
from pathlib import Path

from benchmark.growth import growth_text
from benchmark.loading import loading_text
from benchmark.report import write_report
from benchmark.results_file import Results
from benchmark.speed import speed_text
from benchmark.study import Study
from benchmark.tune import apply_choices, choose


ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmark"


def committed(name, tmp_path):
    """A study and a copy of its results."""
    shutil.copytree(BENCHMARK / "results" / name, tmp_path / name)
    return Study.read(BENCHMARK / "studies" / f"{name}.yaml"), Results(tmp_path / name)


def test_the_report_and_readme(tmp_path, no_pictures):
    study, results = committed("pictograms", tmp_path)
    text = write_report(apply_choices(study, results)[0], results)
    assert text == (BENCHMARK / "results" / "pictograms" / "report.md").read_text()
    assert "Incomplete" not in text
    table = text[text.index("| experiment | parameters") : text.index("\n\n## ")]
    assert table in (ROOT / "README.md").read_text()


def test_the_choices(tmp_path):
    for name in ("pictograms", "ablations"):
        study, results = committed(name, tmp_path)
        assert set(choose(study, results)) == {one.name for one in study.experiments if one.grid}
        for file in ("choices.json", "choices.md"):
            assert (tmp_path / name / file).read_text() == (BENCHMARK / "results" / name / file).read_text()


def test_speed():
    folder = BENCHMARK / "results" / "speed"
    for name, text in (("speed", speed_text), ("growth", growth_text), ("loading", loading_text)):
        assert text(json.loads((folder / f"{name}.json").read_text())) == (folder / f"{name}.md").read_text()
    training, prediction = (folder / "speed.md").read_text().split("## Prediction")
    for part in (training, prediction):
        ratios = part[part.index("| batch |") :].partition("\n\n")[0]
        assert ratios in (ROOT / "README.md").read_text()
