"""What a run of the load generator says: a table for people, a JSON object for programs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from understudy.tools.bench.load import Measurements
from understudy.tools.bench.statistics import Summary

LATENCY_LABELS: Final[Mapping[str, str]] = {
    "ttft_s": "TTFT",
    "itl_s": "ITL",
    "tpot_s": "TPOT",
    "e2e_s": "E2E",
    "lateness_s": "late",
}
_COLUMNS: Final = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """The figures of one run; see tools/bench/README.md for how each is computed."""

    settings: Mapping[str, Any]
    """What was asked for, by name; holds no key."""
    wall_s: float
    requests_sent: int
    requests_completed: int
    prompt_tokens: int | None
    """None where the server tells no usage."""
    output_tokens: int
    arrivals: int
    client_cpu_s: float
    latencies: Mapping[str, Summary | None]
    """In seconds, by the names of LATENCY_LABELS; None where there is no sample."""
    errors: Mapping[str, int]
    error_examples: Mapping[str, str]

    @property
    def requests_failed(self) -> int:
        """How many requests ended with an error of whatever kind."""
        return sum(self.errors.values())

    def per_second(self, amount: float) -> float:
        """A rate over the whole run; 0 for a run without length."""
        return amount / self.wall_s if self.wall_s > 0.0 else 0.0

    @property
    def tokens_per_arrival(self) -> float | None:
        """How many tokens one read of the socket brought, on average."""
        return self.output_tokens / self.arrivals if self.arrivals else None

    @property
    def client_cpu_us_per_token(self) -> float | None:
        """Processor time of the load generator itself for each token it read."""
        return self.client_cpu_s * 1e6 / self.output_tokens if self.output_tokens else None


def make_report(
    settings: Mapping[str, Any], measured: Measurements, *, client_cpu_s: float
) -> ServeReport:
    """Sum up what a run has measured."""
    samples = {
        "ttft_s": measured.time_to_first_token,
        "itl_s": measured.inter_token_latency,
        "tpot_s": measured.time_per_output_token,
        "e2e_s": measured.end_to_end,
        "lateness_s": measured.lateness,
    }
    latencies = {name: kept.summary() for name, kept in samples.items()}
    if latencies["lateness_s"] is None:
        del latencies["lateness_s"]
    return ServeReport(
        settings=settings,
        wall_s=measured.wall_s,
        requests_sent=measured.num_sent,
        requests_completed=measured.num_completed,
        prompt_tokens=None if measured.prompts_without_usage else measured.prompt_tokens,
        output_tokens=measured.output_tokens,
        arrivals=measured.arrivals,
        client_cpu_s=client_cpu_s,
        latencies=latencies,
        errors=dict(measured.errors),
        error_examples=dict(measured.error_examples),
    )


def report_object(report: ServeReport) -> dict[str, Any]:
    """The report as JSON values: seconds, tokens, counts."""
    prompt_tokens = report.prompt_tokens
    return {
        "settings": dict(report.settings),
        "wall_s": report.wall_s,
        "requests": {
            "sent": report.requests_sent,
            "completed": report.requests_completed,
            "failed": report.requests_failed,
            "per_s": report.per_second(report.requests_completed),
        },
        "tokens": {
            "prompt": prompt_tokens,
            "prompt_per_s": None if prompt_tokens is None else report.per_second(prompt_tokens),
            "output": report.output_tokens,
            "output_per_s": report.per_second(report.output_tokens),
            "per_arrival": report.tokens_per_arrival,
        },
        "latencies": {
            name: None if summary is None else asdict(summary)
            for name, summary in report.latencies.items()
        },
        "errors": dict(report.errors),
        "error_examples": dict(report.error_examples),
        "client_cpu_us_per_token": report.client_cpu_us_per_token,
    }


def report_json(value: Mapping[str, Any]) -> str:
    """JSON text for a file: indented, in the given order, with a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first to the left, the others to the right."""
    table = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def render_report(report: ServeReport) -> str:
    """The report for a terminal, without a newline at the end."""
    lines = [
        "  ".join(f"{name} {value}" for name, value in report.settings.items()),
        "",
        (
            f"requests    {report.requests_sent:,} sent, {report.requests_completed:,} completed, "
            f"{report.requests_failed:,} failed in {report.wall_s:.2f} s"
        ),
        (
            f"throughput  {report.per_second(report.requests_completed):,.2f} requests/s, "
            f"{_rate(report, report.output_tokens)} tokens/s out, "
            f"{_rate(report, report.prompt_tokens)} tokens/s in"
        ),
    ]
    if report.tokens_per_arrival is not None and report.client_cpu_us_per_token is not None:
        lines.append(
            f"client      {report.client_cpu_us_per_token:.1f} us of CPU a token, "
            f"{report.tokens_per_arrival:.2f} tokens a read"
        )
    rows = [
        (LATENCY_LABELS[name], *_milliseconds(summary))
        for name, summary in report.latencies.items()
    ]
    lines += ["", render_table(("ms", *_COLUMNS), rows)]
    if report.errors:
        error_rows = [(kind, f"{count:,}") for kind, count in sorted(report.errors.items())]
        lines += ["", render_table(("errors", "count"), error_rows), ""]
        lines += [
            f"first {kind}: {detail}" for kind, detail in sorted(report.error_examples.items())
        ]
    return "\n".join(lines)


def _rate(report: ServeReport, tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{report.per_second(tokens):,.1f}"


def _milliseconds(summary: Summary | None) -> tuple[str, ...]:
    if summary is None:
        return ("-",) * len(_COLUMNS)
    return tuple(f"{getattr(summary, column) * 1000:,.2f}" for column in _COLUMNS)
