"""The report in a real browser: drawn, quiet, no wider than a phone, and printable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from fedllm.app.report.page import write_report
from tests import report_runs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is on PATH")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=10000"),
)
EVIL = {
    "torch": "<script>alert(1)</script>",
    "numpy": "<b>x</b> <a href='http://evil.example'>y</a>",
    "networkx": "a very long name of a hospital with its street, town and department",
}
PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const cut = [...document.querySelectorAll(".plot text")].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.width > 0 && (box.left < -1 || box.right > innerWidth + 1);
  });
  parent.postMessage({
    errors, drawn: root.dataset.drawn, width: root.scrollWidth, inner: innerWidth,
    cut: cut.map((text) => text.textContent), fetched: performance.getEntriesByType("resource").length,
  }, "*");
}, 1500));
</script>
"""
PHONE = """<!doctype html><body style="margin:0"><pre id="found"></pre>
<script>addEventListener("message", (e) => { found.textContent = JSON.stringify(e.data); });</script>
<iframe src="probed.html" style="width:375px;height:800px;border:0"></iframe>
"""


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    profile.mkdir()
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def report(folder: Path, kind: str) -> Path:
    if kind == "crowd":
        return write_report(report_runs.write(folder, *report_runs.crowd()))
    if kind == "started":
        return write_report(report_runs.write(folder, report_runs.events(0, finished=False, everything=False)))
    names = EVIL if kind == "evil" else {}
    lines, measured = report_runs.events(), report_runs.metrics()
    lines[3]["dropped"] = {"numpy": "update is not finite"}
    renamed = report_runs.renamed
    return write_report(report_runs.write(folder, renamed(lines, names), renamed(measured, names)))


@pytest.mark.parametrize(("kind", "figures"), [("finished", 7), ("evil", 7), ("crowd", 5), ("started", 2)])
def test_every_plot_is_drawn_and_nothing_is_complained_of(tmp_path: Path, kind: str, figures: int) -> None:
    seen = browse(report(tmp_path / "run", kind), tmp_path / "profile", "--dump-dom")
    assert f'data-drawn="{figures}"' in seen.stdout
    body = seen.stdout[: seen.stdout.index('<script type="application/json"')]
    drawn = [part for part in re.split(r'id="figure-\d+"', body)[1:] if 'class="main-svg"' in part]
    assert len(drawn) == figures
    assert "CONSOLE" not in seen.stderr
    assert not re.search(r"<(script|b|a)[ >]", body.split("<body", 1)[1])
    if kind == "evil":
        assert "&lt;script&gt;alert(1)&lt;/" in body.split("<svg", 1)[1]


@pytest.mark.parametrize("kind", ["finished", "evil", "crowd"])
def test_on_a_phone_nothing_is_cut_or_sticks_out(tmp_path: Path, kind: str) -> None:
    page = report(tmp_path / "run", kind).read_text(encoding="utf-8")
    # The page's own policy forbids scripts that are not its own, so the probe takes its place.
    probed, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: PROBE, page)
    assert count == 1
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    (tmp_path / "phone.html").write_text(PHONE)
    seen = browse(tmp_path / "phone.html", tmp_path / "profile", "--dump-dom")
    match = re.search(r'<pre id="found">(.+?)</pre>', seen.stdout)
    assert match, seen.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    assert found["errors"] == [] and found["fetched"] == 0
    assert found["inner"] == 375 and found["width"] <= 375
    assert found["cut"] == []


def test_it_prints(tmp_path: Path) -> None:
    page = report(tmp_path / "run", "finished")
    browse(page, tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 9
    # A4 in points; the page's own rule asks for it.
    assert re.search(rb"/MediaBox \[0 0 59[45][.\d]* 84[12][.\d]*\]", pdf)
