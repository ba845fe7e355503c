"""`nds calibrate` finds the temperatures that are there, measures on prompts not fitted to, and is read back."""

import json
import math

import pytest
import torch

from nemotron_dspark import cli, stages
from nemotron_dspark.config import DraftSection, load_config
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import Threshold
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.evaluation.calibration import (
    GRID,
    Calibration,
    Rounds,
    calibration_error,
    chance_error,
    fit_margins,
    fit_temperatures,
)
from nemotron_dspark.evaluation.calibration_report import HEAD, MIN_ROUNDS, CalibrationPrompts, gather
from nemotron_dspark.evaluation.measure import conversation_ids
from nemotron_dspark.targets import Target

GAMMA = 3


def foretold(count: int, scale: tuple[float, ...], seed: int, gamma: int = 4) -> Rounds:
    """Rounds kept with the chances of logits that are told multiplied by ``scale``, a factor a slot."""
    generator = torch.Generator().manual_seed(seed)
    common, own = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (1, gamma))
    right = 1.0 + 1.6 * common + 1.2 * own
    kept = torch.rand(count, gamma, generator=generator, dtype=torch.float64) < torch.sigmoid(right)
    return Rounds(right * torch.tensor(scale), kept.long().cumprod(1).sum(1), torch.full((count,), gamma))


def errors(calibration: Calibration, rounds: Rounds) -> list[float]:
    survival = calibration.survival(rounds.logits)
    outcomes = [rounds.outcome(slot) for slot in range(survival.shape[1])]
    return [calibration_error(survival[known, at], outcome[known]) for at, (known, outcome) in enumerate(outcomes)]


def test_a_head_that_was_scaled_is_scaled_back():
    scale = (3.0, 0.5, 2.0, 4.0)
    fitted, held_out = fit_temperatures(foretold(20_000, scale, seed=0)), foretold(20_000, scale, seed=1)
    # The later a slot, the fewer rounds try it, and the flatter is the error about its least.
    assert fitted.temperatures == pytest.approx(scale, rel=0.2)
    assert fitted.temperatures[:2] == pytest.approx(scale[:2], rel=0.06)
    before, after = errors(Calibration.none(4), held_out), errors(fitted, held_out)
    assert sum(after) < sum(before) / 3
    assert max(after) < 0.02


def test_a_head_that_is_right_is_left_nearly_alone():
    assert fit_temperatures(foretold(20_000, (1.0,) * 4, seed=2)).temperatures == pytest.approx((1.0,) * 4, rel=0.15)


def error_by_hand(chances: list[float], kept: list[bool]) -> float:
    total = 0.0
    for low in range(15):
        inside = [
            at for at, chance in enumerate(chances) if low <= chance * 15 < low + 1 or (low == 14 and chance == 1)
        ]
        if inside:
            gap = sum(chances[at] for at in inside) / len(inside) - sum(kept[at] for at in inside) / len(inside)
            total += len(inside) / len(chances) * abs(gap)
    return total


def test_the_calibration_error_is_that_counted_by_hand():
    chances = [0.0, 0.01, 0.06, 0.07, 0.5, 0.52, 0.53, 0.93, 0.94, 1.0]
    kept = [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    # bins [0, 1/15): 3 rounds, foretold 0.07 of them, kept 1; [1/15, 2/15): 0.07, 0; [7/15, 8/15): 1.55, 1;
    # [13/15, 14/15): 0.93, 1; [14/15, 1]: 1.94, 1.
    by_hand = (0.93 + 0.07 + 0.55 + 0.07 + 0.94) / 10
    found = calibration_error(torch.tensor(chances, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64))
    assert found == pytest.approx(by_hand)
    assert error_by_hand(chances, [bool(each) for each in kept]) == pytest.approx(by_hand)


def test_the_fit_is_the_sequential_search_of_a_plain_loop():
    """Written from the formula: left to right, the temperature at which the survival errs least, those before fixed."""
    rounds = foretold(400, (2.0, 0.6, 3.0), seed=3, gamma=3)
    logits, kept = rounds.logits.tolist(), rounds.kept.tolist()
    temperatures: list[float] = []
    for slot in range(3):
        best = (math.inf, 0.0, 0.0)
        for temperature in (2 ** (step / 16) for step in range(-64, 65)):
            tried = [*temperatures, temperature]
            chances = [math.prod(1 / (1 + math.exp(-row[at] / tried[at])) for at in range(slot + 1)) for row in logits]
            error = error_by_hand(chances, [count > slot for count in kept])
            best = min(best, (round(error, 12), abs(math.log(temperature)), temperature))
        temperatures.append(best[2])
    assert fit_temperatures(rounds).temperatures == pytest.approx(temperatures)


def log_likelihood(calibration, rounds):
    """Of the number of drafts that each round kept, in nats; whole blocks."""
    alive = torch.nn.functional.pad(calibration.survival(rounds.logits), (1, 1))
    alive[:, 0] = 1.0
    return float((alive[:, :-1] - alive[:, 1:]).gather(1, rounds.kept[:, None]).log().sum())


@pytest.mark.parametrize("fit", [fit_temperatures, fit_margins])
@pytest.mark.parametrize("seed", range(12))
def test_a_fit_never_makes_its_own_rounds_less_likely(fit, seed):
    """Also of logits that say nothing, where the error alone would choose a temperature that only hides that."""
    generator = torch.Generator().manual_seed(seed)
    rounds = Rounds(
        4 * torch.randn(60, 4, generator=generator, dtype=torch.float64) + seed % 4,
        torch.randint(0, 5, (60,), generator=generator),
        torch.full((60,), 4),
    )
    assert log_likelihood(fit(rounds), rounds) >= log_likelihood(Calibration.none(4), rounds) - 1e-9


def test_margins_get_the_weight_and_the_bias_that_are_in_them():
    generator = torch.Generator().manual_seed(4)
    margins = 6 * torch.rand(30_000, 2, generator=generator, dtype=torch.float64)
    weights, biases = torch.tensor([0.7, 1.5]), torch.tensor([-0.5, -2.0])
    kept = torch.rand(margins.shape, generator=generator, dtype=torch.float64) < torch.sigmoid(
        margins * weights + biases
    )
    rounds = Rounds(margins, kept.long().cumprod(1).sum(1), torch.full((len(margins),), 2))
    fitted = fit_margins(rounds)
    assert fitted.weights == pytest.approx(weights.tolist(), rel=0.08)
    assert fitted.biases == pytest.approx(biases.tolist(), abs=0.12)
    assert max(errors(fitted, rounds)) < 0.02


def test_a_slot_that_no_round_tried_is_fitted_like_the_others():
    rounds = Rounds(torch.rand(200, 2, dtype=torch.float64), torch.zeros(200, dtype=torch.long), torch.full((200,), 2))
    survival = fit_margins(rounds).survival(rounds.logits)
    given_first = survival[:, 1] / survival[:, 0]
    assert float(survival[:, 0].mean()) < 0.02
    assert float(given_first.mean()) < 0.04


def test_the_error_by_chance_is_the_mean_of_right_ones():
    generator = torch.Generator().manual_seed(5)
    chances = torch.rand(600, generator=generator, dtype=torch.float64)
    drawn = [(torch.rand(600, generator=generator, dtype=torch.float64) < chances).double() for _ in range(300)]
    mean = sum(calibration_error(chances, outcome) for outcome in drawn) / len(drawn)
    assert chance_error(chances) == pytest.approx(mean, rel=0.05)


def test_what_comes_after_a_kept_stop_token_is_not_judged():
    generation = Generation(1, Sampling(), frozenset({9}))
    generation.confidence = [[1.0, 2.0, 3.0]] * 3
    for new in ([5], [5, 6, 7], [5, 9, 7, 8]):  # none kept; two kept; three kept, of which the second ends the answer
        Decoder._note(generation, 3, new)
    rounds = Rounds.of([generation], 3)
    assert (rounds.kept.tolist(), rounds.judged.tolist()) == ([0, 2, 2], [3, 3, 2])
    assert rounds.outcome(2)[0].tolist() == [True, True, False]
    assert rounds.trials(2).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def target(tiny_hybrid) -> Target:
    return Target.load(str(tiny_hybrid))


def new_draft(target: Target, **section) -> DSparkDraft:
    given = {"num_layers": 1, "block_size": GAMMA, "taps": [0, 3], "markov_rank": 8} | section
    draft = DSparkDraft(build_draft_config(target.spec, DraftSection(**given), mask_token_id=5)[0])
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.model.lm_head.weight)
    if draft.confidence_head is not None:
        with torch.no_grad():  # logits of many sizes
            draft.confidence_head.proj.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return draft.eval()


@pytest.fixture(scope="module")
def draft(target) -> DSparkDraft:
    return new_draft(target)


@pytest.fixture
def folder(draft, tmp_path):
    draft.save(tmp_path / "draft")
    return tmp_path / "draft"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two workloads."""
    parent = tmp_path_factory.mktemp("prompts")
    files = []
    for name in ("state", "scan"):
        files.append(parent / f"{name}.jsonl")
        rows = [{"prompt": f"The {name} of block {number}"} for number in range(22)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def nds(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nds", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code or 0


SMALL = ("--set", "eval.max_new_tokens=24", "--set", "eval.batch_size=12")


def test_the_command_writes_what_engines_and_the_decoder_read(target, folder, prompts, capsys):
    arguments = ["calibrate", "-t", target.folder, "-d", folder, "-p", prompts[0], "-p", prompts[1], *SMALL]
    assert nds(*arguments, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "calibration" / "calibration.json").read_text()) == value
    assert (folder / "calibration" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert [fit["sampled_at"] for fit in value["fits"]] == [0.0, 1.0]
    for name, fit in zip(("confidence_sts_0.json", "confidence_sts_1.json"), value["fits"], strict=True):
        engines = json.loads((folder / "calibration" / name).read_text())
        assert set(engines) == {"temperatures", "dataset", "num_samples", "ece_before", "ece_after"}
        assert engines["temperatures"] == fit["temperatures"]
        assert len(engines["temperatures"]) == len(engines["ece_before"]) == len(engines["ece_after"]) == GAMMA
        assert all(min(abs(each - known) for known in GRID) < 1e-9 for each in engines["temperatures"])
        whole, *each = fit["workloads"]
        assert [row["name"] for row in fit["workloads"]] == ["all", "state", "scan"]
        assert whole["conversations"] == [22, 22]
        assert whole["rounds"] == [sum(row["rounds"][half] for row in each) for half in (0, 1)]
        assert engines["num_samples"] == whole["rounds"][0] >= MIN_ROUNDS
    read = load_draft(folder, target).temperatures
    assert read == {fit["sampled_at"]: tuple(fit["temperatures"]) for fit in value["fits"]}


def test_the_command_shows_every_slot_and_workload(target, folder, prompts, tmp_path, capsys):
    arguments = ["calibrate", "-t", target.folder, "-d", folder, "-p", prompts[0], "-p", prompts[1], *SMALL]
    assert nds(*arguments, "-o", tmp_path / "elsewhere", "--set", "eval.temperatures=[1.0]") == 0
    shown = capsys.readouterr().out
    for text in ("temperature 1", "by chance", "state", "scan", "mean", "confidence_sts_1.json"):
        assert text in shown
    assert load_draft(folder, target).temperatures is None


def test_the_reported_errors_are_those_of_the_held_out_rounds(target, draft, prompts):
    """Decoded again, half by half: what is reported is what the fit to one half gives on the other."""
    config = load_config(str(target.folder), eval={"max_new_tokens": 24, "batch_size": 12, "temperatures": (1.0,)})
    (fit,) = stages.calibrate(config, draft, prompts, target=target)[0].fits
    halves = [
        gather(target, draft, CalibrationPrompts("", ids), 1.0, HEAD, config.eval)
        for ids in (conversation_ids(target, file, new_tokens=24) for file in prompts)
    ]
    fitted = fit_temperatures(Rounds.cat([each.fit for each in halves]))
    assert fit.calibration == fitted
    held_out = Rounds.cat([each.held_out for each in halves])
    assert fit.whole.after == pytest.approx(errors(fitted, held_out))
    assert fit.whole.before == pytest.approx(errors(Calibration.none(GAMMA), held_out))
    assert fit.figures[1].after == pytest.approx(errors(fitted, halves[0].held_out))


def test_halves_share_no_conversation(target, draft, monkeypatch):
    """Turns of one stay together, and so do two conversations that begin alike."""
    decoded: list[list[list[int]]] = []

    def record(decoder, prompts, *rest):
        decoded.append([list(ids) for ids in prompts])
        return []

    monkeypatch.setattr("nemotron_dspark.evaluation.calibration_report.decode", record)
    conversations = [[[1, 2], [1, 2, 3]], [[4]], [[1, 2], [1, 2, 9]], [[5], [5, 6]], [[7]]]
    found = gather(target, draft, CalibrationPrompts("w", conversations), 0.0, HEAD, load_config().eval)
    assert decoded == [[[1, 2], [1, 2, 3], [1, 2], [1, 2, 9], [5], [5, 6]], [[4], [7]]]
    assert found.conversations == (3, 2)


def test_a_threshold_is_compared_with_the_calibrated_chance(target, draft):
    recorder = Decoder(target, draft, record_confidence=True)
    logits = recorder.generate([40, 41, 42], Sampling(temperature=0.0, max_new_tokens=2)).confidence[0]
    scaled = new_draft(target)
    chance = torch.sigmoid(torch.tensor(logits[0]) / 4.0).item()
    scaled.temperatures = {0.0: (4.0, 1e-6, 1e-6), 1.0: (1e-6,) * GAMMA}
    for margin, cut in ((-1e-4, False), (1e-4, True)):
        decoder = Decoder(target, scaled, schedule=Threshold(chance + margin), record_confidence=True)
        found = decoder.generate([40, 41, 42], Sampling(temperature=0.0, max_new_tokens=2))
        assert (found.proposed[0] == 0) is cut
        assert found.confidence[0][:1] == ([] if cut else pytest.approx(logits[:1]))  # recorded as the head says them


def test_each_row_is_scaled_for_its_own_temperature_of_sampling(draft, target):
    scaled = new_draft(target)
    scaled.temperatures = {0.0: (1.0, 2.0, 3.0), 1.0: (4.0, 5.0, 6.0)}
    rows = [[1 / weight for weight in weights] for weights, _ in scaled.calibrated([0.7, 0.0, 0.2])]
    assert rows == [pytest.approx(each) for each in ([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
    assert draft.calibrated([0.0, 1.0]) == [((1.0,) * GAMMA, (0.0,) * GAMMA)] * 2


def test_a_draft_without_a_head_is_calibrated_by_its_margins(target, prompts, tmp_path, capsys):
    headless = new_draft(target, confidence_head=False)
    headless.save(tmp_path / "draft")
    assert (
        nds("calibrate", "-t", target.folder, "-d", tmp_path / "draft", "-p", prompts[0], "-p", prompts[1], *SMALL) == 0
    )
    assert "weight" in capsys.readouterr().out
    value = json.loads((tmp_path / "draft" / "calibration" / "calibration.json").read_text())
    assert value["signal"] == "margin"
    assert all(fit["temperatures"] is None and len(fit["weights"]) == GAMMA for fit in value["fits"])
    assert not list((tmp_path / "draft" / "calibration").glob("confidence_sts*"))  # no head that an engine would scale
    loaded = load_draft(tmp_path / "draft", target)
    assert loaded.temperatures is None
    fit = value["fits"][-1]
    assert loaded.lines[fit["sampled_at"]] == (tuple(fit["weights"]), tuple(fit["biases"]))


def test_margins_are_of_the_logits_that_were_drafted_from(target, draft):
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=12)
    seen, right = [], type(draft).begin

    class Watched:
        def __init__(self, block):
            self.block = block

        def next_logits(self, previous):
            seen.append(self.block.next_logits(previous))
            return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(draft), "begin", lambda *arguments: Watched(right(*arguments)))
        found = Decoder(target, draft, record_margins=True).generate([40, 41, 42], sampling)
    ordered = torch.stack(seen)[:, 0].sort(descending=True).values
    margins = (ordered[:, 0] - ordered[:, 1]).reshape(-1, GAMMA)
    torch.testing.assert_close(torch.tensor(found.margins), margins)
    assert Decoder(target, draft).generate([40, 41, 42], sampling).tokens == found.tokens  # recording changes nothing


def test_bad_input_is_refused(target, folder, prompts, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "A state"}\n')
    arguments = ["calibrate", "-t", target.folder, "-d", folder]
    assert nds(*arguments, "-p", one, *SMALL) == 2
    assert "none is left for the held-out half" in capsys.readouterr().err
    few = ["-p", prompts[0], "--limit", "4", "--set", "eval.max_new_tokens=4"]
    assert nds(*arguments, *few) == 2
    said = capsys.readouterr().err
    assert f"and {MIN_ROUNDS} of each are needed" in said
    assert "times as many prompts" in said
    assert not (folder / "calibration").exists()
    (folder / "calibration").mkdir()
    (folder / "calibration" / "calibration.json").write_text("{}")
    assert nds(*arguments, *few) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_draft_for_another_target_is_refused(folder, tiny_llama, prompts, capsys):
    assert nds("calibrate", "-t", tiny_llama, "-d", folder, "-p", prompts[0]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("temperatures", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, "x", 1.0], "warm"])
def test_temperatures_that_do_not_fit_the_draft_are_refused(target, folder, temperatures):
    fits = {"fits": [{"sampled_at": 0.0, "temperatures": temperatures}], "draft_digest": ""}
    (folder / "calibration").mkdir()
    (folder / "calibration" / "calibration.json").write_text(json.dumps(fits))
    with pytest.raises(InputError, match="does not hold 3 numbers, one a slot"):
        load_draft(folder, target)


def test_temperatures_of_a_draft_that_was_trained_on_are_refused(target, draft, folder, prompts):
    config = load_config(str(target.folder), eval={"max_new_tokens": 24, "batch_size": 12, "temperatures": (1.0,)})
    stages.calibrate(config, folder, prompts, target=target)
    assert load_draft(folder, target).temperatures
    changed = new_draft(target)
    with torch.no_grad():
        changed.norm.weight[0] += 0.1
    changed.save(folder)
    with pytest.raises(InputError, match="other weights"):
        load_draft(folder, target)
