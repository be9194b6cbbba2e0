"""The pure parts of a comparison with other engines: prompts, rounds, tables, charts, flags."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from understudy.runtime.processor import field
from understudy.tools.bench import compare
from understudy.tools.bench.columns import (
    COLUMNS,
    Answered,
    Prompt,
    find_words,
    prompts_of,
    rate,
)
from understudy.tools.bench.comparison import Round, as_object, is_ours, medians, ratios, render
from understudy.tools.bench.machine import machine
from understudy.tools.bench.peers.processes import Dialect, Running, completion_body, convert
from understudy.tools.bench.peers.write_gguf import gguf_name
from understudy.tools.bench.plot import Panel, bar_chart
from understudy.tools.bench.servers import ServerFailed

BY_NAME = {column.name: column for column in COLUMNS}
ROUNDS = [
    Round("understudy", {"single": 20.0, "prefill": 1000.0}, 4.0, 3.0, 2.0),
    Round("other", {"single": 10.0, "prefill": 1500.0}, 2.0, 1.5, 3.0),
    Round("understudy", {"single": 30.0, "prefill": 1000.0}, 6.0, 5.0, 2.0),
    Round("other", {"single": 15.0, "prefill": 1500.0}, 2.0, 1.5, 3.0),
]


def spelled(token_ids: list[int]) -> str:
    """A vocabulary in which every second token is a word, and every tenth is not made of text."""
    return "".join(f" {chr(97 + n % 26)}{'x' * (n // 26)}" if n % 2 else "#" for n in token_ids)


def tokens_of(text: str) -> list[int]:
    word = text.strip()
    number = ord(word[0]) - 97 + 26 * (len(word) - 1)
    return [0, 0] if number % 10 == 5 else [number]


def test_words_are_tokens_that_their_text_becomes_again() -> None:
    words = find_words(400, tokens_of, spelled)
    assert [word.token_id for word in words[:5]] == [1, 3, 7, 9, 11]
    assert words[0].text == " b"


def test_a_vocabulary_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 tokens"):
        find_words(11, tokens_of, spelled)


def test_prompts_share_what_their_column_says_and_nothing_else() -> None:
    words = find_words(400, tokens_of, spelled)
    column = BY_NAME["common"]
    prompts = prompts_of(column, words, seed=0)
    assert len(prompts) == 8
    assert {len(prompt.token_ids) for prompt in prompts} == {544}
    assert len({prompt.token_ids[:512] for prompt in prompts}) == 1
    assert len({prompt.token_ids[512:] for prompt in prompts}) == 8
    assert prompts == prompts_of(column, words, seed=0)
    assert prompts_of(column, words, seed=1)[0].token_ids[:16] != prompts[0].token_ids[:16]
    assert len({p.token_ids[:16] for p in prompts_of(BY_NAME["distinct"], words, seed=0)}) == 8
    assert prompts[0].text == spelled(list(prompts[0].token_ids))


def test_a_column_counts_prompt_or_output() -> None:
    answered = Answered(2.0, 1000, 30)
    assert rate(BY_NAME["prefill"], answered) == 500.0
    assert rate(BY_NAME["single"], answered) == 15.0


def test_lines_are_medians_in_the_order_of_the_first_round() -> None:
    lines = medians(ROUNDS)
    assert [line.engine for line in lines] == ["understudy", "other"]
    assert lines[0] == ("understudy", {"single": 25.0, "prefill": 1000.0}, 5.0, 4.0, 2.0)


def test_ratios_are_to_each_engine_of_ours() -> None:
    found = ratios(medians(ROUNDS))
    rates = {"single": 0.5, "prefill": 1.5}
    assert found == {
        "understudy": {"other": {**rates, "start": 0.4, "restart": 0.375, "memory": 1.5}}
    }
    assert is_ours("understudy-int8")
    assert not is_ours("understudied")


def test_the_tables_have_a_row_for_each_engine() -> None:
    text = render(medians(ROUNDS), [BY_NAME["single"], BY_NAME["prefill"]])
    lines = text.splitlines()
    assert lines[1].split() == ["understudy", "25.0", "1,000", "5.0", "4.0", "2.0"]
    assert lines[-1].split() == ["other", "0.50", "1.50", "0.40", "0.38", "1.50"]


def test_a_round_without_a_column_shows_a_dash() -> None:
    lines = medians([Round("understudy", {}, 1.0, 1.0, 1.0)])
    assert render(lines, [BY_NAME["single"]]).splitlines()[1].split()[1] == "-"


def test_all_of_it_is_json() -> None:
    value = as_object(ROUNDS, [BY_NAME["single"]], {"machine": machine()})
    again = json.loads(json.dumps(value))
    assert again["medians"][1]["rates"] == {"single": 12.5, "prefill": 1500.0}
    assert len(again["rounds"]) == 4
    assert again["machine"]["cores"] >= 1


def test_a_field_is_the_first_of_its_name() -> None:
    assert (
        field("model\t\t: 106\nmodel name\t: Fast <R>\nmodel name\t: x\n", "model name")
        == "Fast <R>"
    )
    assert field("", "flags") == ""


def test_a_chart_is_svg_with_a_bar_for_each_value() -> None:
    panels = [Panel("a & b", {"ours": 200.0, "<other>": 50.0}), Panel("nothing", {"ours": 0.0})]
    root = ET.fromstring(bar_chart(panels, highlighted=["ours"]))
    bars = [element for element in root if element.tag.endswith("rect")]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[0] == 4 * widths[1]
    assert widths[2] == 0.0
    assert bars[0].attrib["fill"] == bars[2].attrib["fill"] != bars[1].attrib["fill"]
    texts = [element.text for element in root if element.tag.endswith("text")]
    assert texts[:3] == ["a & b", "ours", "200"]
    assert "<other>" in texts


def test_no_panels_are_a_chart_too() -> None:
    assert ET.fromstring(bar_chart([])).tag.endswith("svg")


def test_a_body_has_the_servers_dialect() -> None:
    prompt = Prompt((5, 6), " a b")
    ids = json.loads(completion_body(Dialect("m", {"ignore_eos": True}), prompt, 7))
    assert ids["prompt"] == [5, 6]
    assert (ids["max_tokens"], ids["ignore_eos"], ids["temperature"]) == (7, True, 0.0)
    text = json.loads(completion_body(Dialect("m", {}, takes_text=True), prompt, 7))
    assert text["prompt"] == " a b"


def test_a_conversion_appears_once_it_is_whole_and_is_not_made_twice(tmp_path: Path) -> None:
    target = tmp_path / "converted" / "model"
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('whole')"
    assert convert(target, [sys.executable, "-c", program, "{}"], {}) == target
    assert target.read_text() == "whole"
    assert convert(target, ["/no/such/command"], {}) == target
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_conversion_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ServerFailed, match="no such thing"):
        convert(target, [sys.executable, "-c", "raise SystemExit('no such thing')"], {})
    with pytest.raises(ServerFailed):
        convert(target, ["/no/such/command"], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.23.self_attn.q_proj.bias", "blk.23.attn_q.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_tensors_have_llama_cpps_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


@dataclass(frozen=True)
class ScriptedPeer:
    """Answers in no time, or fails."""

    name: str
    family: str = "vllm"
    installed: str | None = "engine 1.0"
    unprepared: bool = False

    def version(self) -> str | None:
        return self.installed

    def prepare(self, model: Path, converted: Path) -> Path:
        if self.unprepared:
            raise ServerFailed("no converter")
        return model

    def command(self, model: Path, *, port: int, threads: int) -> Sequence[str]:
        return ("engine", str(model), str(port), str(threads))

    @contextmanager
    def running(self, model: Path, *, threads: int) -> Iterator[Running]:
        yield ScriptedEngine()


class ScriptedEngine:
    def ask(self, prompts: Sequence[Prompt], *, concurrency: int, output_tokens: int) -> Answered:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return Answered(2.0, prompt_tokens, len(prompts) * output_tokens)

    def memory_bytes(self) -> int:
        return 3_000_000_000


def test_a_turn_measures_every_column() -> None:
    words = find_words(400, tokens_of, spelled)
    contender = compare.Contender(ScriptedPeer("fast"), "1", Path("m"))
    columns = [BY_NAME["single"], BY_NAME["prefill"]]
    done = compare.run_once(contender, columns, words, threads=1, seed=0)
    assert done.engine == "fast"
    assert done.rates == {"single": 64.0, "prefill": 1024.0}
    assert done.memory_gb == 3.0


def test_who_is_not_installed_or_cannot_read_the_model_takes_no_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [
        ScriptedPeer("one"),
        ScriptedPeer("two", installed=None),
        ScriptedPeer("three", unprepared=True),
    ]
    contenders = compare.take_part(peers, tmp_path, tmp_path)
    assert [contender.peer.name for contender in contenders] == ["one"]
    said = capsys.readouterr().err
    assert "two: not installed" in said
    assert "three: its model could not be made: no converter" in said


def test_rounds_are_interleaved_and_who_fails_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns: list[tuple[str, int]] = []

    def measure(contender: compare.Contender, number: int) -> Round:
        turns.append((contender.peer.name, number))
        if contender.peer.name == "faulty" and number == 1:
            raise ServerFailed("it fell over")
        return Round(contender.peer.name, {"single": 1.0}, 1.0, 1.0, 1.0)

    contenders = [
        compare.Contender(ScriptedPeer(name), "1", Path("m")) for name in ("sound", "faulty")
    ]
    kept: list[list[str]] = []
    rounds = compare.run_rounds(
        contenders, 3, measure, lambda rounds: kept.append([done.engine for done in rounds])
    )
    assert turns == [("sound", 0), ("faulty", 0), ("sound", 1), ("faulty", 1), ("sound", 2)]
    assert [done.engine for done in rounds] == ["sound"] * 3
    one, two = ["sound"], ["sound", "faulty"]
    assert kept == [one, two, [*two, "sound"], one * 2, one * 3]
    assert "it fell over" in capsys.readouterr().err


def test_panels_put_the_fastest_on_top() -> None:
    single, prefill = compare.panels(ROUNDS, [BY_NAME["single"], BY_NAME["prefill"]])
    assert list(single.values) == ["understudy", "other"]
    assert list(prefill.values) == ["other", "understudy"]


def test_the_settings_name_no_directory_of_the_machine() -> None:
    contender = compare.Contender(ScriptedPeer("fast"), "1", Path("/home/someone/model"))
    settings = compare.settings_object([contender], Path("/home/someone/model"), 2)
    assert "someone" not in json.dumps(settings)
    assert settings["commands"] == {"fast": "engine model 0 2"}
    words = ("/opt/peers/vllm/bin/vllm", "serve", "--model=/home/someone/model", "--port=0")
    assert compare.shown_command(words) == "vllm serve --model=model --port=0"


def test_ours_are_first_and_every_family_has_a_peer() -> None:
    peers = compare.all_peers({})
    assert [peer.name for peer in peers[:2]] == ["understudy", "understudy-int8"]
    assert {peer.family for peer in peers} == {"understudy", *compare.FAMILIES}
    assert len({peer.name for peer in peers}) == len(peers)


@pytest.mark.parametrize(
    "words",
    [
        ("--peers=vlm",),
        ("--columns=single,single",),
        ("--peer-venv=vllm",),
        ("--peer-venv=vllm=/no/such/venv",),
        ("--rounds=0",),
    ],
)
def test_wrong_flags_are_usage_errors(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.parser().parse_args(["--model=x", *words])
    assert ended.value.code == 2
    assert words[0].split("=")[0] in capsys.readouterr().err


def test_a_flag_names_a_peers_environment() -> None:
    venv = Path(sys.prefix)
    arguments = compare.parser().parse_args(["--model=x", f"--peer-venv=vllm={venv}"])
    assert isinstance(arguments, argparse.Namespace)
    assert arguments.peer_venv == [("vllm", venv)]


def test_the_driver_needs_nothing_of_understudy() -> None:
    script = Path(compare.__file__).parent / "peers" / "driver.py"
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(script)!r}, run_name='driver')\n"
        "sys.exit(any(name.startswith('understudy') for name in sys.modules))\n"
    )
    subprocess.run([sys.executable, "-P", "-I", "-c", program], check=True, timeout=60)
