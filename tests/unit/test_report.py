from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from fedllm.app.report.data import compare, losses, read_run
from fedllm.app.report.figure import folded, label
from fedllm.app.report.page import write_report
from fedllm.app.report.words import apart, lead, perplexity, plain
from tests import report_runs

EVIL = {"torch": "<script>alert(1)</script>", "numpy": "<b>x</b> & <a href='http://evil.example'>y</a>"}


class Page(HTMLParser):
    """What a browser would find in a page: its tags and the text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.data = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        kind = dict(attrs).get("type")
        self.inside = (kind or tag) if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "application/json":
            self.data += data
        elif not self.inside:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    @property
    def figures(self) -> list[dict[str, Any]]:
        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        return json.loads(self.data, parse_constant=refuse)


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_finished_run_says_what_federation_bought(tmp_path: Path) -> None:
    made = page(report_runs.write(tmp_path / "run"))
    for said in (
        "the federated model is better than the base model: mean held-out loss 3.25 against 4.12",
        "better than every model that one silo trained alone (3.30 to 3.34",
        "numpy (3.07 alone against 3.09)",
        "Training on everything in one place reaches 3.23, 0.02 lower than federated.",
        "No privacy guarantee is claimed.",
        "‖Σ p B A \N{MINUS SIGN} B̄ Ā‖ / ‖Σ p B A‖",
        "server sees each update",
        "921,600 (0.69 % of the model), lora",
        'id = "smollm2-135m-instruct"',
    ):
        assert said in made.text, said
    assert "not finished" not in made.text and "Dropped updates" not in made.text
    assert len(made.figures) == 7
    places = [tag["id"] for _, tag in made.tags if (tag.get("id") or "").startswith("figure-")]
    assert places == [f"figure-{place}" for place in range(7)]


def test_the_only_file_left_is_the_report_and_a_second_one_replaces_it(tmp_path: Path) -> None:
    run = report_runs.write(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == [
        "events.jsonl",
        "metrics.json",
        "recipe.toml",
        "report.html",
    ]


def test_every_figure_is_one_that_plotly_accepts(tmp_path: Path) -> None:
    runs = [report_runs.write(tmp_path / "few"), report_runs.write(tmp_path / "many", *report_runs.crowd(60))]
    for run in runs:
        for spec in page(run).figures:
            go.Figure(spec)


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    made = page(report_runs.write(tmp_path / "run"))
    allowed = {"img", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not [tag for tag, _ in made.tags if tag in allowed]
    assert not [tag for tag, values in made.tags if {"src", "href", "srcset"} & set(values)]
    policies = [values["content"] for _, values in made.tags if values.get("http-equiv")]
    assert len(policies) == 1
    policy = policies[0] or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_a_name_that_is_markup_stays_a_name(tmp_path: Path) -> None:
    run = report_runs.write(
        tmp_path / "run",
        report_runs.renamed(report_runs.events(), EVIL),
        report_runs.renamed(report_runs.metrics(), EVIL),
    )
    (run / "recipe.toml").write_text('name = "</pre></script><script>alert(2)</script>"')
    made = page(run)
    assert len([tag for tag, _ in made.tags if tag == "script"]) == 3
    assert not [tag for tag, _ in made.tags if tag in ("b", "a")]
    assert EVIL["torch"] in made.text and "<script>alert(2)" in made.text
    assert "<script" not in made.data
    tags = set(re.findall(r"<[^>]*>", json.dumps(made.figures)))
    assert tags <= {"<br>", "<i>", "</i>", "<extra>", "</extra>"}


def test_a_label_is_text_to_plotly_and_keeps_equal_names_apart() -> None:
    assert label("<i>&amp;") == "&lt;i&gt;&amp;amp;"
    assert plain("a\nb\u202ec\x00") == "a b c"
    assert plain("x" * 50 + "end", 10) == "xxxxxx…end"
    assert folded("abc") == "abc"
    assert folded("Genetics Home Reference") == "Genetics Home<br>Reference"
    assert folded("x" * 30).count("<br>") == 1


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_run_in_progress_has_a_report(tmp_path: Path, rounds: int) -> None:
    lines = report_runs.events(rounds, finished=False, everything=False)
    made = page(report_runs.write(tmp_path / "run", lines))
    assert f"This run has not finished: round {rounds} of 3." in made.text
    assert "What federation bought each silo" in made.text
    assert "Pooled" not in made.text and "“Alone”" not in made.text and "Lone models" not in made.text


def test_a_run_that_has_only_started_or_says_almost_nothing_has_a_report(tmp_path: Path) -> None:
    made = page(report_runs.write(tmp_path / "started", [report_runs.start()]))
    assert "There is no held-out loss of a federated model yet" in made.text
    made = page(report_runs.write(tmp_path / "bare", [{"event": "start"}]))
    assert made.figures == []


def test_no_events_is_one_clear_sentence(tmp_path: Path) -> None:
    from fedllm.core.errors import FedllmError

    with pytest.raises(FedllmError, match=r"events\.jsonl is missing or empty"):
        write_report(tmp_path)


def test_a_torn_line_and_a_half_written_metrics_file_are_left_out(tmp_path: Path) -> None:
    run = report_runs.write(tmp_path / "run", report_runs.events(2, finished=False, everything=False))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event":"round","round":3,"loss":{"tor')
    (run / "metrics.json").write_text('{"loss"')
    assert "round 2 of 3" in page(run).text


def test_after_a_resume_the_last_of_each_round_counts(tmp_path: Path) -> None:
    first = report_runs.events(2, finished=False, everything=False)
    again = [report_runs.start(), *report_runs.events(3, everything=False)[3:]]
    found = read_run(report_runs.write(tmp_path / "run", first + again))
    assert [entry["round"] for entry in found.rounds] == [1, 2, 3]
    assert found.starts == 2 and found.done
    assert "resumed once" in page(tmp_path / "run").text


def test_what_is_not_a_number_leaves_no_trace_in_the_plots(tmp_path: Path) -> None:
    lines = report_runs.events()
    lines[2]["loss"]["torch"] = math.nan
    lines[2]["aggregation_error"] = math.inf
    lines[3]["seconds"]["train"] = None
    measured = report_runs.metrics()
    measured["loss"]["federated"] = report_runs.FEDERATED | {"torch": math.nan}
    made = page(report_runs.write(tmp_path / "run", lines, measured))
    assert len(made.figures) == 7
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", made.text)
    assert losses({"a": math.nan, "b": True, "c": "3", "d": 1}) == {"d": 1.0}


def test_of_a_thousand_silos_the_ends_and_the_distribution_are_shown(tmp_path: Path) -> None:
    run = report_runs.write(tmp_path / "run", *report_runs.crowd())
    made = page(run)
    rows = [values for tag, values in made.tags if tag == "th" and values.get("scope") == "row"]
    assert len(rows) < 60
    assert "The 20 silos with the highest loss" in made.text and "960 silos between" in made.text
    assert "120 updates did not count" in made.text and "and 100 more" in made.text
    assert max(len(trace.get("x", [])) for spec in made.figures for trace in spec["data"]) < 50
    assert "practice_0500" not in made.data
    found = compare(read_run(run))
    worst = max(found.federated, key=found.federated.__getitem__)
    assert worst in made.text


def test_dropped_updates_are_named_with_their_reason(tmp_path: Path) -> None:
    lines = report_runs.events()
    lines[3]["dropped"] = {"numpy": "update is not finite"}
    made = page(report_runs.write(tmp_path / "run", lines))
    assert "1 update did not count, and the rounds went on without: update is not finite." in made.text


def test_the_claim_changes_where_the_plan_protects_updates(tmp_path: Path) -> None:
    lines = report_runs.events()
    lines[0]["plan"]["steps"].append({"where": "wire", "name": "secure_aggregation", "facts": {"sees": "sum"}})
    made = page(report_runs.write(tmp_path / "run", lines))
    assert "neither secure aggregation nor differential privacy" not in made.text
    assert "sees sum" in made.text


def test_accuracy_and_scores_have_tables_where_they_were_measured(tmp_path: Path) -> None:
    lines = report_runs.events(3, everything=False)
    lines[1] |= {"accuracy": {"a": 0.5}, "scores": {"arc_easy": {"accuracy": 0.4, "n": 100, "error": 0.05}}}
    lines[-2]["accuracy"] = {"a": 0.75}
    lines[-1]["scores"] = {"arc_easy": {"accuracy": 0.5, "n": 100, "error": 0.05}}
    made = page(report_runs.write(tmp_path / "run", lines))
    assert "Accuracy on held-out text" in made.text and "a 0.50 0.75 Mean 0.50 0.75" in made.text
    assert "arc_easy 0.400 0.500 ± 0.050 100" in made.text


def test_the_answer_does_not_flatter(tmp_path: Path) -> None:
    measured = report_runs.metrics()
    measured["loss"]["federated"] = {name: value + 0.3 for name, value in report_runs.BASE.items()}
    run = read_run(report_runs.write(tmp_path / "run", report_runs.events(), measured))
    said = " ".join(lead(run, compare(run)))
    assert "worse than the base model" in said and "lower for none of 4 silos" in said
    assert "no better than the average model that one silo trained alone" in said
    measured["loss"]["federated"] = {name: 3.0 for name in report_runs.BASE}
    run = read_run(report_runs.write(tmp_path / "run", report_runs.events(), measured))
    said = " ".join(lead(run, compare(run)))
    assert "no silo's own model is better than the federated one" in said
    assert "no better than federated" in said


def test_numbers_are_written_as_people_read_them() -> None:
    assert apart(3.1, 3.1) == ["3.10", "3.10"]
    assert perplexity(2.0) == "7.39" and perplexity(20.0) == "e^20.0" and perplexity(None) == "\u2013"
