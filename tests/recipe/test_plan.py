"""`nds plan`: its formulas against figures computed otherwise, its table, its advice, and bad input."""

import dataclasses
import importlib
import json
import re

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nemotron_dspark.cache.compact import CompactLayout
from nemotron_dspark.cache.deepspec_layout import bytes_per_token
from nemotron_dspark.cache.needs import stored_bytes
from nemotron_dspark.cli import plan_command, shell
from nemotron_dspark.config import CacheConfig, load_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.recipe import needs, plan
from nemotron_dspark.recipe.describe import inspect
from nemotron_dspark.recipe.machines import MACHINES, Machine, machine
from nemotron_dspark.recipe.workload import from_file, from_numbers
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets.streamed import StreamedTarget
from nemotron_dspark.training.schedule import most_processes
from tests.kill9 import prepared_forkserver
from tests.recipe.nemotrons import NEMOTRONS

H_8B = next(row for row in NEMOTRONS if row.name == "Nemotron-H-8B-Base-8K")
SUPER_120B = next(row for row in NEMOTRONS if "Super-120B" in row.name)
NANO_30B = next(row for row in NEMOTRONS if "Nano-30B" in row.name)
WIDE = Machine("wide", "everything", 1, 1e15, 1e15, 1e18, 1e15, 1e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nothing but the config.json of Nemotron-H-8B."""
    made = tmp_path_factory.mktemp("targets") / H_8B.name
    made.mkdir()
    (made / "config.json").write_text(json.dumps(H_8B.config()))
    return made


@pytest.fixture(scope="module")
def shape(folder):
    return needs.Shape.of(inspect(load_config(target=str(folder))))


@pytest.fixture
def nds(monkeypatch):
    """Run `nds plan` with ``arguments``, 80 columns wide; the result has exit_code, stdout and stderr."""
    app = typer.Typer()
    app.callback()(lambda: None)
    plan_command.register(app)
    monkeypatch.setattr(shell.out, "_width", 80)
    return lambda *arguments: CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def planned(shape, machine_=WIDE, samples=50_000, mean=800, settings=(), **options):
    config = load_config(assignments=settings)
    return plan.estimate(shape, config, from_numbers(samples, mean, config.data, 8192), machine_, **options)


def column(found, mode):
    return next(column for column in found.columns if column.mode == mode)


def test_disk_of_8b_is_what_its_page_says(shape):
    disk = column(planned(shape), "cached").disk
    assert disk["cache"] == 49_158 * 40_000_000 + 56 * 50_000
    assert disk["checkpoints"] == pytest.approx(3 * 12 * 1.242e9, rel=1e-3)
    assert disk["draft"] == pytest.approx(2 * (1.242e9 + 2 * 131072 * 4096), rel=1e-3)
    assert disk["target"] == pytest.approx(16.2e9, rel=1e-3)


def test_a_quantised_target_takes_its_stored_bytes_on_disk_and_those_of_bf16_in_memory(shape, tmp_path):
    """The index, which comes with the small files, says how large the shards are."""
    quantisation = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps(H_8B.config() | {"quantization_config": quantisation}))
    index = {"metadata": {"total_size": 9_200_000_000}, "weight_map": {"lm_head.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    quantised = needs.Shape.of(inspect(load_config(target=str(tmp_path))))
    whole, stored = column(planned(shape), "cached"), column(planned(quantised), "cached")
    assert stored.disk == whole.disk | {"target": 9.2e9}
    assert stored.memory == whole.memory


def test_memory_of_8b_is_fixed_terms_and_activations(shape):
    found = needs.training_bytes(shape, load_config().train, 4096, 0.6, 2, gpu=True)
    fixed = 18 * 1.242e9 + 4 * 131072 * 4096
    slots, keys = 64 * 7, 4096 + 64 * 7
    layer = slots * (6 * 4096 + 4 * 4096 + 4 * 14336) + keys * (4096 + 4 * 1024)
    activations = 2 * (5 * layer + 4096 * 7 * 4096 + 2 * slots * 4096)
    assert fixed + activations < found.device < 1.05 * (fixed + activations) + 0.5e9
    assert found.host == pytest.approx(16 * 1.242e9 + 4 * 131072 * 4096, rel=0.03)


def test_a_window_keeps_of_what_lies_before_it_its_context_keys_and_values(shape):
    windowed = load_config(assignments=["train.window=4096"]).train
    short, long = (needs.training_bytes(shape, windowed, length, 0.6, 2, gpu=True).device for length in (4096, 32768))
    taps = bytes_per_token(shape.taps, 4096) + 8
    assert long - short == pytest.approx((32768 - 4096) * (2 * taps + 2 * (4096 + 5 * 2 * 1024)))
    assert long < needs.training_bytes(shape, load_config().train, 32768, 0.6, 2, gpu=True).device


def test_hours_are_work_over_the_assumed_share(shape):
    found = column(planned(shape), "cached")
    body = H_8B.billions * 1e9 - 2 * 131072 * 4096
    forward = 2 * body * 40e6 / (1e15 * needs.ASSUMED.forward)
    written = found.disk["cache"] / needs.ASSUMED.write
    assert found.hours["cache"] * 3600 == pytest.approx(max(forward, written), rel=1e-3)
    slow = column(planned(shape, dataclasses.replace(WIDE, flops=1e14)), "cached")
    assert slow.hours["cache"] * 3600 == pytest.approx(10 * forward, rel=1e-3)
    twice = column(planned(shape, samples=100_000), "cached")
    assert twice.hours["train"] == pytest.approx(2 * found.hours["train"], rel=1e-6)
    longer = column(planned(shape, settings=["train.epochs=10"]), "online")
    assert longer.hours["train"] == pytest.approx(column(planned(shape), "online").hours["train"] * 2, rel=1e-6)


def test_experts_that_a_token_is_not_sent_to_cost_no_time(tmp_path):
    target = tmp_path / "moe"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(NANO_30B.config()))
    found = needs.Shape.of(inspect(load_config(target=str(target))))
    assert found.parameters == pytest.approx(31.578e9, rel=1e-3)
    assert 3.0e9 < found.active < 3.8e9  # sold as 30B-A3B


@pytest.fixture(scope="module")
def super_120b(tmp_path_factory):
    """The sizes of Nemotron 3 Super, 241 GB in BF16."""
    made = tmp_path_factory.mktemp("targets") / "super"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(SUPER_120B.config() | {"quantization_config": None}))
    return needs.Shape.of(inspect(load_config(target=str(made))))


def test_a_target_that_does_not_fit_is_streamed_and_leaves_two_stages_to_an_engine(super_120b):
    spark = MACHINES["dgx-spark"]
    found = planned(super_120b, spark)
    cached, online = column(found, "cached"), column(found, "online")
    assert found.recommended == "cached"
    assert set(cached.memory) == {"cache", "train"}
    assert set(cached.hours) == {"cache", "train"}
    streaming = cached.streaming
    assert (streaming.passes - 1) * streaming.tokens < found.workload.tokens <= streaming.passes * streaming.tokens
    assert streaming.read == streaming.passes * super_120b.stored_bytes
    of_a_token = (super_120b.taps + 3) * super_120b.hidden * 2
    resident = needs.streamed_bytes(super_120b, 2, 100e9)
    assert cached.memory["cache"].gpu > resident + streaming.tokens * of_a_token
    assert not streaming.in_groups
    assert online.streaming is None
    assert {problem.partition(":")[0] for problem in online.problems} == {"train", "eval"}
    assert found.reason.endswith("An engine that holds the target must write the answers and measure.")
    assert found.commands[-1].startswith("nds eval")
    assert "--engine URL" in found.commands[-1]
    slow = column(planned(super_120b, dataclasses.replace(spark, flops=1e18)), "cached")
    assert slow.hours["cache"] * 3600 == pytest.approx(streaming.read / needs.ASSUMED.read)


def test_a_target_that_one_gpu_does_not_hold_is_measured_on_all_of_them(super_120b):
    node = MACHINES["h100x8"]
    found = planned(super_120b, node)
    cached = column(found, "cached")
    assert cached.streaming is not None
    weights = 2 * super_120b.parameters
    assert weights / node.gpus < cached.memory["eval"].gpu < 0.6 * node.gpu_bytes < weights
    assert "--draft" in found.commands[-1]
    assert "answers" in cached.hours
    assert (
        "train fits where 4 GPUs hold the target and the others train (--inference-gpus 1)."
        in column(found, "online").advice
    )
    two = planned(super_120b, dataclasses.replace(node, gpus=2))
    assert "eval" not in column(two, "cached").memory
    assert not any("--inference-gpus" in advice for advice in column(two, "online").advice)


def test_gpus_that_run_the_target_alone_take_it_from_the_others_and_compute_meanwhile(shape):
    node = MACHINES["h100x8"]

    def settings(apart):
        return [f"train.inference_gpus={apart}", "train.global_batch_size=96"]

    beside, two, four, six = (
        column(planned(shape, node, settings=settings(apart)), "online") for apart in (0, 2, 4, 6)
    )
    assert two.memory["train"].gpu < beside.memory["train"].gpu - 2 * shape.parameters
    assert two.hours["train"] == pytest.approx(2 * four.hours["train"])  # the others wait for the target
    assert six.hours["train"] > 2 / 6 * two.hours["train"]  # which waits for two that train
    train = load_config(assignments=settings(2)).train
    assert [most_processes(train, gpus) for gpus in (1, 4, 7, 8)] == [3, 4, 6, 8]
    assert most_processes(train, 8, nodes=5) == 0


def test_quantised_weights_are_answered_from_as_they_are_stored(super_120b):
    """A Spark holds Super in 4 bits: it writes the answers itself, at the rate at which these bytes are read."""
    spark = MACHINES["dgx-spark"]
    stored = column(planned(dataclasses.replace(super_120b, quantised=True, stored_bytes=76 * 10**9), spark), "cached")
    twice = column(planned(dataclasses.replace(super_120b, quantised=True, stored_bytes=38 * 10**9), spark), "cached")
    assert "eval" not in stored.hours
    assert twice.hours["answers"] < stored.hours["answers"] < 2 * twice.hours["answers"]
    assert stored.streaming.read == pytest.approx(stored.streaming.passes * 76e9)


def test_a_target_that_fits_is_streamed_only_when_asked(shape):
    assert not any(column.streaming for column in planned(shape).columns)
    asked = planned(shape, settings=["target.stream=on"])
    assert {column.mode for column in asked.columns if column.streaming} == {"cached", "compact", "rolling"}
    assert "eval" in column(asked, "cached").memory


def test_resident_bytes_of_a_streamed_target_are_those_of_one(tiny_hybrid):
    shape = needs.Shape.of(inspect(load_config(target=str(tiny_hybrid))))
    target = StreamedTarget.load(str(tiny_hybrid), dtype="float32")
    layers = max(target._weights.bytes_of(layer) for layer in range(shape.spec.num_layers))
    embedding = target.model.get_input_embeddings().weight.numel()
    assert needs.streamed_bytes(shape, 4, 1e9) == 2 * layers + 4 * embedding


def test_of_layers_that_do_not_fit_twice_the_experts_are_planned_in_groups(super_120b):
    small = dataclasses.replace(MACHINES["dgx-spark"], gpu_bytes=30e9, host_bytes=30e9)
    found = column(planned(super_120b, small), "cached")
    two_layers = 2 * 2 * super_120b.largest_layer
    assert found.streaming.in_groups
    assert needs.streamed_bytes(super_120b, 2, 15e9) < two_layers + 2 * super_120b.vocab * super_120b.hidden
    assert found.memory["cache"].gpu < 30e9
    asked = plan._Case(super_120b, load_config(), from_numbers(10, 800, load_config().data, 8192), small)
    wide = dataclasses.replace(asked, machine=MACHINES["dgx-spark"])
    used = super_120b.config["num_experts_per_tok"]
    assert asked.token_bytes - wide.token_bytes == (used + 2) * super_120b.hidden * 2


def test_a_draft_that_does_not_fit_is_told_how_many_layers_would(super_120b):
    small = dataclasses.replace(MACHINES["dgx-spark"], gpu_bytes=30e9)
    found = column(planned(super_120b, small), "cached")
    setting = re.search(r"train fits with --set (draft\.num_layers=\d+)", " ".join(found.advice)).group(1)
    fewer = super_120b.with_layers(int(setting.partition("=")[2]))
    assert not [text for text in column(planned(fewer, small), "cached").problems if text.startswith("train")]


def test_modes_are_those_the_configuration_accepts():
    for mode in plan.MODES:
        if mode.setting:
            assert load_config(assignments=[mode.setting]).cache.mode == mode.name
    assert plan.MODES[0].name == "cached"


def test_a_full_disk_changes_the_recommendation_and_says_what_would_fit(shape):
    roomy = planned(shape, MACHINES["dgx-spark"])
    assert roomy.recommended == "cached"
    tight = planned(shape, MACHINES["dgx-spark"], samples=150_000)
    assert tight.recommended != "cached"
    cached = column(tight, "cached")
    assert "5.96 TB are needed, there are 3.6 TB" in cached.problems[0]
    fitting = int(re.search(r"about ([\d,]+) samples", cached.advice[0]).group(1).replace(",", ""))
    assert not column(planned(shape, MACHINES["dgx-spark"], samples=fitting), "cached").problems
    assert column(planned(shape, MACHINES["dgx-spark"], samples=fitting + 1000), "cached").problems
    taps = int(re.search(r"num_taps=(\d)", cached.advice[1]).group(1))
    assert stored_bytes(CacheConfig(), 120_000_000, 0, 150_000, num_taps=taps, hidden_size=shape.hidden) < 3.6e12
    assert tight.recommended == "compact"
    assert tight.commands[0].endswith("--cache-format compact")
    tighter = planned(shape, MACHINES["dgx-spark"], samples=600_000)
    assert tighter.recommended == "rolling"
    assert any("cache.mode=rolling" in command and "--data" in command for command in tighter.commands)


def test_a_compact_cache_is_asked_for_only_where_the_other_does_not_fit(shape):
    fast = dataclasses.replace(WIDE, flops=2e15)  # so that writing the cache takes longer than computing it
    found = planned(shape, fast)
    compact, cached = column(found, "compact"), column(found, "cached")
    assert compact.total_hours < cached.total_hours
    assert compact.disk["cache"] < 0.3 * cached.disk["cache"]
    assert found.recommended == "cached"
    quicker = f"compact takes only {plan.hours(compact.total_hours)}"
    assert f"{quicker}, with hidden states that are not exact" in found.reason
    again = planned(shape, MACHINES["dgx-spark"], samples=150_000, settings=["cache.format=compact"])
    assert "--cache-format" not in again.commands[0]  # the user's own option is in the command already
    rolled = planned(shape, settings=["cache.format=compact"], samples=12_000)
    assert column(rolled, "rolling").disk["cache"] < 200e9 < column(rolled, "cached").disk["cache"]
    assert column(planned(shape, samples=12_000), "rolling").disk["cache"] == 200e9


def test_disk_of_a_compact_cache_is_that_of_its_layout(shape):
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 900, 400)
    kept = lengths // 2
    layout = CompactLayout.of(lengths, kept, taps=range(5), hidden_size=4096, shard_bytes=1 << 30)
    written = sum(layout.shard_sizes) + layout.records.nbytes
    predicted = stored_bytes(
        CacheConfig(format="compact"), int(lengths.sum()), int(kept.sum()), 400, num_taps=5, hidden_size=4096
    )
    assert predicted == pytest.approx(written, rel=1e-4)
    assert predicted < written


def test_memory_that_does_not_suffice_names_the_setting_that_helps(shape):
    small = Machine("small", "small", 1, 29e9, 1e12, 1e15, 1e14, 1e12)
    found = column(planned(shape, small, settings=["train.recipe=paper"]), "cached")
    assert any("train: " in problem and "on one GPU" in problem for problem in found.problems)
    setting = re.search(r"train fits with --set (train\.num_anchors=\d+)", " ".join(found.advice)).group(1)
    assert not [
        text
        for text in column(planned(shape, small, settings=["train.recipe=paper", setting]), "cached").problems
        if "train" in text
    ]
    tiny = Machine("tiny", "tiny", 1, 8e9, 1e12, 1e15, 1e14, 1e12)
    assert planned(shape, tiny).recommended is None


def test_dollars_are_hours_times_the_price(shape):
    found = column(planned(shape, price=2.5), "cached")
    assert found.dollars == pytest.approx(2.5 * sum(found.hours.values()))


def test_the_table_fits_80_columns_and_ends_with_the_commands(nds, folder):
    result = nds(
        "--target", str(folder), "--samples", "50000", "--mean-length", "800", "-m", "dgx-spark", "--price", "1"
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if "nds " not in line)
    for words in (
        "1.97 TB",
        "of 120 GB",
        "Dollars",
        "Recommended: cached",
        "nds cache build",
        "nds train",
        "62 TFLOPS",
    ):
        assert words in result.stdout, words


def test_a_mode_that_does_not_fit_is_red(nds, folder, monkeypatch):
    console = Console(force_terminal=True, color_system="standard", width=80, record=True, highlight=False)
    monkeypatch.setattr(shell, "out", console)
    nds("--target", str(folder), "--samples", "150000", "--mean-length", "800", "-m", "dgx-spark")
    assert "\x1b[31mcached does not fit:" in console.export_text(styles=True)


def test_json_is_one_object(nds, folder):
    result = nds("--target", str(folder), "--samples", "100", "--mean-length", "50", "-m", "h100x8", "--json")
    found = json.loads(result.stdout)
    assert found["machine"]["gpus"] == 8
    assert found["columns"][0]["mode"] == "cached"
    assert found["columns"][0]["fits"] is True
    assert found["columns"][0]["disk"]["cache"] == 49_158 * 5000 + 56 * 100


def test_every_gpu_builds_and_trains(nds, folder):
    given = ("--target", str(folder), "--samples", "100000", "--mean-length", "50", "--json")
    one, eight = (
        {column["mode"]: column for column in json.loads(nds(*given, "-m", name).stdout)["columns"]}
        for name in ("h200", "h100x8")
    )
    for mode in ("cached", "compact", "rolling", "online"):
        assert eight[mode]["hours"]["train"] < one[mode]["hours"]["train"] / 4
        assert eight[mode]["memory"]["train"]["host"] > 3 * one[mode]["memory"]["train"]["host"]
    train = json.loads(nds(*given, "-m", "h100x8").stdout)["commands"][-2]
    assert train.startswith("torchrun --nproc-per-node 8 -m nemotron_dspark train ")
    uneven = json.loads(nds(*given, "-m", "h100x8", "--set", "train.global_batch_size=6").stdout)
    assert "--nproc-per-node 6 " in uneven["commands"][-2]


def test_here_is_measured(tmp_path):
    found = machine("cpu", tmp_path)
    assert found.gpus == 0
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert found.host_bytes > 1e8
    assert found.disk_bytes > 0


def test_a_data_file_is_tokenised_as_a_cache_build_would(tiny_hybrid, tmp_path):
    from transformers import AutoTokenizer

    from nemotron_dspark.data.samples import read_samples

    file = tmp_path / "answers.jsonl"
    rows = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "state and block " * n}]
        for n in range(5, 15)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows) + "not json\n")
    tokenizer, data = AutoTokenizer.from_pretrained(tiny_hybrid), load_config().data
    lengths = [len(item.tokens.input_ids) for item in read_samples(file, tokenizer, data) if hasattr(item, "tokens")]
    found = from_file(file, tokenizer, data, 4096)
    assert (found.samples, found.tokens, found.longest) == (len(lengths), sum(lengths), max(lengths))
    guessed = from_file(file, None, data, 4096)
    assert guessed.samples == 10
    assert "guessed" in guessed.source


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "dgx_spak", "--samples", "1", "--mean-length", "9"], "Did you mean dgx-spark"),
        (["-m", "h100x8"], "either a file or two numbers"),
        (["-m", "h100x8", "--samples", "5"], "either a file or two numbers"),
        (["-m", "h100x8", "--samples", "0", "--mean-length", "9"], "at least 1"),
        (["-m", "h100x8", "--samples", "5", "--mean-length", "9999"], "beyond the longest sample, 4096"),
        (["-m", "h100x8", "--samples", "5", "--mean-length", "9", "--answer-share", "1.5"], "not a share"),
        (["-m", "h100x8", "--samples", "5", "--mean-length", "9", "--price", "-1"], "negative"),
        (["-m", "h100x8", "--data", "absent.jsonl"], "is not a file"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(nds, folder, options, words):
    with pytest.raises(InputError, match=words):
        nds("--target", str(folder), *options)


def test_a_malformed_data_file_is_refused(nds, folder, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"messages": \n[1]\n')
    with pytest.raises(InputError, match="no usable conversation"):
        nds("--target", str(folder), "-m", "h100x8", "--data", str(file))


@pytest.mark.slow
def test_disk_is_predicted_to_a_percent_and_memory_to_ten(capsys, monkeypatch):
    monkeypatch.syspath_prepend(resource_folder("configs").parent / "benchmarks")
    monkeypatch.setattr("sys.argv", ["plan.py", "--recipe", "decoder", "--json"])
    prepared_forkserver()
    code = importlib.import_module("plan").main()
    said = capsys.readouterr().out
    assert code == 0, said
    assert len(json.loads(said)["rows"]) == 5


def test_the_best_checkpoint_of_a_run_with_held_out_samples_is_counted(shape):
    plain, validated = (
        column(planned(shape, settings=[f"train.validation={share}"]), "cached").disk for share in (0, 0.05)
    )
    assert validated["checkpoints"] == pytest.approx(plain["checkpoints"] * 4 / 3)  # two newest, one being written
