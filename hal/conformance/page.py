"""The report as one static page: backends by levels by dtypes, and every cell that is not green."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from halyard.hal.conformance.levels import LEVELS, MUTANTS
from halyard.hal.conformance.results import BAD, load, split_id
from halyard.hal.errors import ConfigError

__all__ = ["render", "write_page"]

DTYPES = ("float32", "bfloat16", "float16")
Report = dict[str, Any]


def write_page(directory: Path) -> Path:
    """DIRECTORY/index.html over every DIRECTORY/*/results.json."""
    reports = [load(file) for file in sorted(directory.glob("*/results.json"))]
    if not reports:
        raise ConfigError(f"{directory} holds no */results.json")
    page = directory / "index.html"
    try:
        page.write_text(render(reports), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write {page}: {error.strerror}") from error
    return page


def render(reports: Sequence[Report]) -> str:
    """The page. Needs no network, no script and no other file."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    ok = all(report["summary"]["ok"] for report in reports)
    total = Counter(result["status"] for report in reports for result in report["results"])
    head = (
        f'<h1>Halyard conformance</h1><p class="lead"><b class="{"good" if ok else "bad"}">'
        f"{'Every claim holds' if ok else 'Some claims do not hold'}</b> &middot; "
        f"{len(reports)} backend{'s' if len(reports) != 1 else ''} &middot; "
        f"{total['passed']:,} cells passed, {sum(total[s] for s in BAD):,} did not, "
        f"{total['not_claimed']:,} not claimed</p>"
    )
    body = head + _matrix(reports) + "".join(_backend(report) for report in reports)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Halyard conformance</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _e(value: object) -> str:
    return html.escape(str(value))


def _matrix(reports: Sequence[Report]) -> str:
    """One row a backend and dtype, one column a level, and the headroom that is left."""
    heads = "".join(
        f'<th scope="col">{level.name}<small>{_e(level.title)}</small></th>'
        for level in (*LEVELS, MUTANTS)
    )
    rows = "".join(_matrix_rows(report) for report in reports)
    return (
        '<div class="scroll"><table class="matrix"><thead><tr><th scope="col">backend</th>'
        f'<th scope="col">dtype</th>{heads}<th scope="col">worst error<small>of its limit</small>'
        f"</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _matrix_rows(report: Report) -> str:
    dtypes = [d for d in DTYPES if d in report["row_dtypes"]] or [""]
    rows = []
    for position, dtype in enumerate(dtypes):
        name = ""
        if position == 0:
            parts = report["parts"]
            name = (
                f'<th scope="rowgroup" rowspan="{len(dtypes)}"><a href="#{_e(report["backend"])}">'
                f"{_e(report['backend'])}</a><small>{_e(parts['device'])} &middot; "
                f"{_e(parts['kernels'])} &middot; {_e(parts['graph'])}</small></th>"
            )
        cells = "".join(_cell(report, level.name, dtype) for level in (*LEVELS, MUTANTS))
        rows.append(
            f'<tr>{name}<td class="dtype">{_e(dtype)}</td>{cells}'
            f"<td>{_headroom(report, dtype)}</td></tr>"
        )
    return "".join(rows)


def _cell(report: Report, level: str, dtype: str) -> str:
    """Counts of one level in one dtype; cases without a dtype count for each."""
    count: Counter[str] = Counter()
    for result in report["results"]:
        own, _, of = split_id(result["id"])
        if own == level and of in ("", dtype):
            count[result["status"]] += 1
    bad = sum(count[status] for status in BAD)
    if bad:
        kinds = ", ".join(f"{count[status]} {status}" for status in BAD if count[status])
        return f'<td class="bad">{kinds}<small>{count["passed"]} passed</small></td>'
    aside = f"<small>{count['not_claimed']} not claimed</small>" if count["not_claimed"] else ""
    if count["passed"]:
        return f'<td class="good">{count["passed"]} passed{aside}</td>'
    return f'<td class="none">{aside or "&mdash;"}</td>'


def _headroom(report: Report, dtype: str) -> str:
    worst = report["summary"]["worst"].get(dtype)
    if worst is None:
        return ""
    text = f"{worst['error']:.2g} of {worst['limit']:.2g}"
    return f"{_bar(worst['share'], worst['case'])}<small>{_e(text)}</small>"


def _bar(share: float, title: str) -> str:
    """How much of a limit an error takes."""
    kind = "bad" if share > 1 else "tight" if share > 0.8 else "good"
    width = min(share, 1.0) * 100
    return (
        f'<div class="bar" title="{_e(title)}"><i class="{kind}" style="width:{width:.0f}%"></i>'
        f"</div><b>{share:.0%}</b>"
    )


def _backend(report: Report) -> str:
    device = report["device"] or {}
    kill = report["summary"]["kill_rate"]
    facts = {
        "device": f"{device.get('name', '?')} ({device.get('arch', '?')})",
        "date": f"{datetime.fromisoformat(report['date']):%Y-%m-%d %H:%M} UTC",
        "took": f"{report['seconds']:,.0f} s",
        "what was run": _scope(report),
        "versions": ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        "digest of the parts": report["digest"][:16],
        "broken kernels noticed": "not run" if kill is None else f"{kill:.0%}",
        "fallbacks": "; ".join(report["fallbacks"]) or "none",
        "again": report["command"],
    }
    rows = "".join(
        f"<dt>{_e(name)}</dt><dd>{f'<code>{_e(v)}</code>' if name == 'again' else _e(v)}</dd>"
        for name, v in facts.items()
    )
    return (
        f'<section id="{_e(report["backend"])}"><h2>{_e(report["backend"])}</h2><dl>{rows}</dl>'
        f"{_changes(report)}{''.join(_level_details(report))}</section>"
    )


def _scope(report: Report) -> str:
    """All of the suite, or which part of it."""
    parts = [f"{kind} {', '.join(names)}" for kind, names in report["asked"].items() if names]
    told = "; ".join(parts) or "all of the suite"
    return told + (" (interrupted)" if report.get("interrupted") else "")


def _changes(report: Report) -> str:
    changed = report["changes"]
    if not changed:
        return ""
    items = "".join(
        f"<li><code>{_e(c['id'])}</code> {_e(c['before'])} &rarr; {_e(c['after'])}</li>"
        for c in changed[:50]
    )
    more = f"<li>and {len(changed) - 50} more</li>" if len(changed) > 50 else ""
    return f"<h3>Different from the run before</h3><ul>{items}{more}</ul>"


def _level_details(report: Report) -> Iterator[str]:
    for level in (*LEVELS, MUTANTS):
        own = [r for r in report["results"] if split_id(r["id"])[0] == level.name]
        if not own:
            continue
        bad = [r for r in own if r["status"] in BAD]
        rows = "".join(_result_row(report, result) for result in own)
        yield (
            f"<details{' open' if bad else ''}><summary>{level.name} {_e(level.title)}: "
            f"{len(own)} cells{f', <b class=bad>{len(bad)} not passed</b>' if bad else ''}"
            f'</summary><p class="again">One cell again: <code>{_e(report["command"])} --case '
            f"'{_e(own[0]['id'])}'</code></p>"
            '<div class="scroll"><table class="cells"><thead><tr><th>cell</th><th>status'
            "</th><th>error</th><th>of its limit</th><th>seconds</th><th>what it says</th></tr>"
            f"</thead><tbody>{rows}</tbody></table></div></details>"
        )


def _result_row(report: Report, result: dict[str, Any]) -> str:
    status = result["status"]
    kind = {"passed": "good", "not_claimed": "none"}.get(status, "bad")
    error, bar = "", ""
    if result["error"] is not None:
        error = f"{result['error']:.2e}"
        if result["limit"]:
            bar = _bar(result["error"] / result["limit"], f"limit {result['limit']:.2e}")
    notes = ", ".join(f"{k}: {v}" for k, v in result["notes"].items())
    said = _e(result["message"] or notes)
    if result["detail"]:
        said += f"<pre>{_e(result['detail'])}</pre>"
    if status in BAD:
        said += f"<code>{_e(report['command'])} --case '{_e(result['id'])}'</code>"
    return (
        f"<tr><td><code>{_e(result['id'])}</code></td>"
        f'<td class="{kind}">{_e(status.replace("_", " "))}</td><td>{error}</td><td>{bar}</td>'
        f"<td>{result['seconds']:.2f}</td><td>{said}</td></tr>"
    )
