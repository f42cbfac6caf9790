"""Beside others' code on the same numbers: transformers' GPT-2, lm-eval's wikitext, TRL's losses.

Run it by pytest -m peers. The libraries are imported where they are used, so that the default run,
which leaves these tests out, does not wait for them.
"""

import base64
import gzip
import importlib.util
import json
import math
import os
import re
import shutil
import socket
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_helpers import make_run
from helpers import BYTE, REAL, fails, plain_logprobs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import align
import eval as evaluation
import evals.perplexity as ppl
from corpus.tokenizer import load_tokenizer
from evals import report
from evals.baselines import Baseline, load_baseline
from evals.results import read_results
from inference import scoring
from inference.scoring import windows_nll
from runtime.checkpoint import weights_hash

missing = [name for name in ("transformers", "lm_eval") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        bool(missing), reason=f"no {' and '.join(missing)}: pip install -r requirements-peers.txt"
    ),
]

MARKED = """ \n = Homarus = \n \n Homarus , known as the " lobster " ( or <unk> ) , \
is 1 @,@ 000 @.@ 5 mm long ; it 's well @-@ known . \n \n = = Description = = \n
 The lobsters ' claws [ both ] are large : who knew ? \n a = 3 \n = = = Size = = = \n \n \
20 ° C and N others ! \n \n = Tamar Grain = \n \n Short . \n = X = \n
 It said ' yes ' – “ no ” { maybe } 🐟 in /' 5/ or so . \n"""
MARKED += " ".join(f"word{i} ( {i} ) , and so on ." for i in range(60)) + " \n \n"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing of this may need the network, nor write into a home directory."""

    def refuse(*args, **keys):
        raise AssertionError("a socket was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("socket", "create_connection", "getaddrinfo"):
            patch.setattr(socket, name, refuse)
        yield


def real(name: str) -> Path:
    if not (REAL / name).is_file():
        pytest.skip(f"no {name} in {REAL} (set MODERN_LLM_DATA)")
    return REAL / name


def text_of(which: str) -> str:
    """A text in WikiText's form.

    Made of its marks, or the first three articles of the real WikiText-2.
    """
    if which == "marks":
        return MARKED
    text = gzip.decompress(real("wikitext2_raw_valid.txt.gz").read_bytes()).decode()
    return text[: [heading.start() for heading in re.finditer(r"(?m)^ = [^=\n]+ = $", text)][3]]


def pages(text: str) -> list[str]:
    """The documents of EleutherAI/wikitext_document_level.

    Lines put together again, a new page at each line " = Title = ".
    """
    found = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"\s*= [^=].* =\s*|\s*= [^=] =\s*", line) and not re.search(
            r"= =\s*$", line
        ):
            found.append([])
        found[-1].append(line)
    return [page for page in map("\n".join, found) if page.strip()]


def save_gpt2(folder: Path, tokenizer, n_positions: int = 32):
    """A small transformers GPT-2 with every parameter random, saved. -> the model"""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    eos = tokenizer.eos
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=eos + 1,
            n_positions=n_positions,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=eos,
            eos_token_id=eos,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


def theirs(model, ids: list[int], scored: int) -> float:
    """nats of the last ids of one window, by transformers' own loss."""
    labels = torch.tensor([[-100] * (len(ids) - scored) + ids[len(ids) - scored :]])
    with torch.no_grad():
        return model(torch.tensor([ids]), labels=labels).loss.item() * scored


# --------------------------------------------------------------------------------------------------
# transformers' GPT-2 through our protocols


def test_padding_and_batches_change_nothing_for_gpt2_either(tmp_path, monkeypatch):
    """Positions are absolute, and counted from the left.

    What is padded on the right is never seen. Each window has the nats it has alone.
    """
    model = save_gpt2(tmp_path / "gpt2", BYTE)
    peer, draws = Baseline(str(tmp_path / "gpt2")), np.random.default_rng(0)
    windows = [
        (draws.integers(0, 257, n).tolist(), k)
        for n, k in ((9, 8), (2, 1), (30, 4), (17, 16), (32, 31))
    ]
    wanted = [theirs(model, *window) for window in windows]
    for room in (1, 40, 1000):
        monkeypatch.setattr(scoring, "AT_ONCE", (room, room))
        assert windows_nll(peer, windows) == pytest.approx(wanted, rel=1e-5)
    assert windows_nll(peer, [(list(range(33)), 32)]) == pytest.approx(
        [
            -model(torch.arange(32)[None])
            .logits[0]
            .log_softmax(-1)[torch.arange(32), torch.arange(1, 33)]
            .sum()
            .item()
        ],
        rel=1e-5,
    )  # a rolling window: as many inputs as there are positions


def test_token_protocols_are_those_of_transformers_documentation(tmp_path):
    """tokens, strided and per_line, each window by transformers' own loss.

    strided is the loop of its page "Perplexity of fixed-length models".
    """
    model = save_gpt2(tmp_path / "gpt2", BYTE)
    peer = Baseline(str(tmp_path / "gpt2"))
    rows = {row.protocol: row.estimate for row in ppl.perplexity(peer, BYTE, MARKED)}
    ids = BYTE.encode(MARKED)
    for protocol, stride in (("tokens", 32), ("strided", 16)):
        nats, n, before = 0.0, 0, 0
        for begin in range(0, len(ids), stride):
            end = min(begin + 32, len(ids))
            scored = min(
                end - before, end - begin - 1
            )  # the first id of a window has no prediction
            nats, n, before = nats + theirs(model, ids[begin:end], scored), n + scored, end
            if end == len(ids):
                break
        assert rows[protocol].value == pytest.approx(math.exp(nats / n), rel=1e-5)
        assert rows[protocol].n == n
    lines = [BYTE.encode(line)[:32] for line in MARKED.split("\n") if line.strip()]
    n = sum(len(line) - 1 for line in lines)
    assert rows["per_line"].value == pytest.approx(
        math.exp(sum(theirs(model, line, len(line) - 1) for line in lines) / n), rel=1e-5
    )
    assert rows["per_line"].n == n


def test_a_baseline_is_a_row_of_every_table(tmp_path, capsys):
    """A run of another tokenizer, and a GPT-2 directory beside it.

    The same protocols and record, the weights' hash included.
    """
    ranks, folder = real("gpt2.tiktoken"), tmp_path / "my-gpt2"
    argv = [
        *make_run(tmp_path),
        "--tasks=text_perplexity",
        f"--baselines={folder}/",
        "--no_overwrite",
    ]
    shutil.copy(ranks, tmp_path / "data")
    tokenizer = load_tokenizer("gpt2", str(tmp_path / "data"))
    save_gpt2(folder, tokenizer)
    assert evaluation.main(argv) == 0
    rows = read_results(str(tmp_path / "run"))
    own = {row["protocol"]: row for row in rows if row["model"] == "my-gpt2"}
    peer = Baseline(str(folder))
    wanted = ppl.perplexity(peer, tokenizer, (tmp_path / "data/wiki/test.txt").read_text())
    assert {protocol: row["value"] for protocol, row in own.items()} == {
        row.protocol: pytest.approx(row.estimate.value, rel=1e-6) for row in wanted
    }
    assert tuple(own) == ppl.PROTOCOLS and {row["weights_hash"] for row in own.values()} == {
        weights_hash(peer.state_dict())
    }
    assert {row["model"] for row in rows} == {
        "untrained",
        "unigrams of the text",
        "pretrain",
        "sft",
        "dpo",
        "my-gpt2",
    } and own["words"]["overlap"] is None
    assert re.search(
        r"\| trivial answer \|.* dpo \| my-gpt2 \|",
        Path(report.write_report(str(tmp_path / "run"), str(tmp_path / "run"), 1)).read_text(),
    )
    capsys.readouterr()
    assert evaluation.main(argv) == 0 and "all results exist" in capsys.readouterr().out
    folder.rename(tmp_path / "sft")
    fails(
        lambda: evaluation.main([*argv[:-2], f"--baselines={tmp_path / 'sft'}"]),
        "called sft already",
        "rename",
    )


def test_a_baseline_must_be_loaded_whole(tmp_path):
    """from_pretrained fills a missing weight with random numbers and goes on.

    A figure of such a model must not come to be.
    """
    from safetensors.torch import load_file, save_file

    folder = str(tmp_path / "gpt2")
    model = save_gpt2(tmp_path / "gpt2", BYTE)
    path, load = os.path.join(folder, "model.safetensors"), lambda: Baseline(folder)
    weights = load_file(path)
    published = {
        name.removeprefix("transformer."): x for name, x in weights.items()
    }  # as in the folders of 2019, with masks
    for layer in range(2):
        published |= {
            f"h.{layer}.attn.bias": torch.ones(32, 32).tril()[None, None],
            f"h.{layer}.attn.masked_bias": torch.tensor(-1e4),
        }
    save_file(published, path, {"format": "pt"})
    assert weights_hash(load().model.state_dict()) == weights_hash(model.state_dict())
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({k: x for k, x in weights.items() if k != name}, path, {"format": "pt"})
    fails(load, folder, "missing keys", name)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, path, {"format": "pt"})
    fails(load, folder)
    save_file(weights | {"transformer.h.2.ln_1.weight": torch.ones(16)}, path, {"format": "pt"})
    fails(load, folder, "unexpected keys")
    Path(path).write_bytes(b"half a file")
    fails(load, folder, "cannot be loaded")
    os.remove(path)
    fails(load, folder, "cannot be loaded")
    os.remove(os.path.join(folder, "config.json"))
    fails(load, folder, "config.json")
    fails(lambda: Baseline(str(tmp_path / "nowhere")), "nowhere")


def test_a_baseline_of_another_vocabulary_is_refused(tmp_path):
    """Its numbers would be of other texts than the ones encoded."""
    shutil.copy(real("gpt2.tiktoken"), tmp_path)
    save_gpt2(tmp_path / "gpt2", BYTE)
    fails(lambda: load_baseline(str(tmp_path / "gpt2"), str(tmp_path)), "257", "vocabulary")


# --------------------------------------------------------------------------------------------------
# lm-evaluation-harness's own task wikitext


def harness(lm, text: str, folder: Path) -> dict[str, float]:
    """Its task, its metrics, its aggregation; only the data set's address is ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    path, task = folder / "pages.jsonl", folder / "task.yaml"
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages(text)))
    task.write_text(
        json.dumps(
            {
                "include": str(Path(lm_eval.__file__).parent / "tasks/wikitext/wikitext.yaml"),
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": dict.fromkeys(("train", "validation", "test"), str(path)),
                    "cache_dir": str(folder / "cache"),
                },
            }
        )
    )
    manager = TaskManager(include_defaults=False)  # no index of its thousands of other tasks
    results = lm_eval.simple_evaluate(
        lm, tasks=[str(task)], task_manager=manager, bootstrap_iters=0
    )["results"]["wikitext"]
    return {name.removesuffix(",none"): value for name, value in results.items()}


def assert_same(model, tokenizer, text: str, theirs: dict[str, float]) -> None:
    found = ppl.perplexity(model, tokenizer, text, ("words", "bpb"))
    rows = {row.protocol: row.estimate for row in found}
    ours = {
        "word_perplexity": rows["words"].value,
        "bits_per_byte": rows["bpb"].value,
        "byte_perplexity": 2 ** rows["bpb"].value,
    }
    print(
        {name: abs(value / theirs[name] - 1) for name, value in ours.items()}
    )  # pytest -m peers -s
    assert ours == {name: pytest.approx(theirs[name], rel=1e-5) for name in ours}


@pytest.mark.parametrize("which", ["marks", "WikiText-2"])
def test_words_and_bpb_of_our_model_are_the_harnesss(which, tmp_path):
    """Our GPT as a model of the harness, by its own rolling windows and a plain log_softmax."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = tiny(seq_len=96)

    class Ours(LM):
        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            documents = [
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        BYTE.encode(request.args[0]), BYTE.eos, model.cfg.seq_len, 1
                    ),
                )
                for request in requests
            ]
            return [
                sum(
                    plain_logprobs(model, context + wanted)[-len(wanted) :].sum().item()
                    for context, wanted in windows
                )
                for windows in documents
            ]

        loglikelihood = generate_until = None  # abstract there, and no part of this task

    text = text_of(which)
    assert_same(model, BYTE, text, harness(Ours(), text, tmp_path))


@pytest.mark.parametrize("tokens", ["byte", "gpt2"])
@pytest.mark.parametrize("which", ["marks", "WikiText-2"])
def test_words_and_bpb_of_gpt2_are_the_harnesss(which, tokens, tmp_path):
    """The harness's model class for transformers, beside our protocols on the same folder.

    Its tokenizer is of that library, made of the same ranks.
    """
    pytest.importorskip(
        "accelerate", reason="lm_eval's class imports it: pip install -r requirements-peers.txt"
    )
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = tmp_path / "byte.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    ranks = str(real("gpt2.tiktoken") if tokens == "gpt2" else ranks)
    tokenizer, text = load_tokenizer(ranks), text_of(which)
    model = save_gpt2(tmp_path / "gpt2", tokenizer, n_positions=64)
    # GPT-2's own split; ours is its faster form for tiktoken
    split = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(
            ranks, split, extra_special_tokens=["<|endoftext|>"]
        ).converted(),
        eos_token="<|endoftext|>",
    )
    assert fast.encode(text) == tokenizer.encode(text) and fast.eos_token_id == tokenizer.eos
    lm = HFLM(pretrained=model, tokenizer=fast, batch_size=8)
    assert_same(Baseline(str(tmp_path / "gpt2")), tokenizer, text, harness(lm, text, tmp_path))


class Spy:
    """A tokenizer that encodes nothing, and keeps what it is asked to encode."""

    def __init__(self):
        self.eos, self.bos, self.scored = 0, 0, []

    def encode(self, article):
        self.scored.append(article)
        return [0]


def test_every_real_article_is_cut_and_detokenised_as_in_the_harness():
    """WikiText-2, validation and test.

    Pages, their bytes and words, and the text that is scored. None is left out or cut elsewhere.
    """
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    for name, count in (("valid", 60), ("test", 62)):
        text = gzip.decompress(real(f"wikitext2_raw_{name}.txt.gz").read_bytes()).decode()
        documents, spy = [{"page": page} for page in pages(text)], Spy()
        found = ppl.perplexity(tiny(n_layer=1), spy, text, ("words", "bpb"))
        rows = {row.protocol: row.estimate.items.den for row in found}
        assert len(documents) == count and spy.scored == [
            wikitext_detokenizer(document) for document in documents
        ]
        assert rows["words"] == [
            process_results(document, (0.0,))["word_perplexity"][1] for document in documents
        ]
        assert rows["bpb"] == [
            process_results(document, (0.0,))["bits_per_byte"][1] for document in documents
        ]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                " ",
                " ",
                "s",
                "'",
                "/",
                "5",
                "@-@",
                "@,@",
                "@.@",
                ":",
                ";",
                ".",
                "!",
                "?",
                ",",
                "(",
                ")",
                "[",
                "]",
                "{",
                "}",
                '"',
                "=",
                "°",
                "\n",
                "N",
                "a",
                "é",
            ]
        ),
        max_size=30,
    ).map("".join)
)
def test_any_text_is_detokenised_as_in_the_harness(page):
    """Also where marks are nested, torn or doubled: there other rules would differ first."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    assert ppl.detokenize(page) == wikitext_detokenizer({"page": page})


# ------------------------------------------------------------------------------------------------
# TRL's trainers


SUMMED = st.lists(st.floats(-200, -0.01), min_size=4, max_size=4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@given(logps=SUMMED, lengths=st.lists(st.integers(1, 60), min_size=4, max_size=4))
@settings(deadline=None, max_examples=50)
def test_simpo_is_trls(smoothing, logps, lengths):
    """The same names give the same loss and the same metrics, beta and gamma as users know them."""
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    policy, lengths = torch.tensor(logps).view(2, 2), torch.tensor(lengths).view(2, 2)
    cfg = align.DPOConfig(loss_type="simpo", beta=2.0, simpo_gamma=1.4, label_smoothing=smoothing)
    place = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        **vars(cfg), alpha=0.0, cpo_alpha=0.0, accelerator=place, aux_loss_enabled=False
    )
    none = torch.zeros(())
    trainer.concatenated_forward = lambda model, batch: (*(policy / lengths), none, none, none)
    trainer.cpo_loss = partial(CPOTrainer.cpo_loss, trainer)
    loss, wanted = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
    task = object.__new__(align.DPO)
    task.cfg = cfg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "sequence_logprobs", lambda model, batch: policy)
        ours, sums = task.loss(None, {"reference": torch.zeros(2, 2), "lengths": lengths})
    assert ours.item() / 2 == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name in align.DPO.metrics[1:]:
        assert sums[name].item() / 2 == pytest.approx(wanted[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("clip_high, beta", [(None, 0.0), (0.28, 0.0), (None, 0.04)])
def test_the_loss_of_rl_is_trls(loss_type, clip_high, beta):
    """Value and gradient of GRPOTrainer's own method, its clipped tokens and its divergence."""
    pytest.importorskip("trl")
    from trl import GRPOTrainer

    cfg = align.RLConfig(loss_type=loss_type, clip_high=clip_high, beta=beta, epochs=2)
    torch.manual_seed(0)
    policy = -3 * torch.rand(6, 9, dtype=torch.float64)
    old, reference = (policy + 0.4 * torch.randn_like(policy) for _ in range(2))
    lengths = torch.tensor([9, 1, 4, 7, 2, 5])
    sampled, advantages = torch.arange(9) < lengths[:, None], torch.randn(6).double()
    found = []
    for ours in (True, False):
        logps = policy.clone().requires_grad_()
        if ours:
            some = (old, reference if beta else None, advantages, sampled, cfg, 9)
            loss, means = scoring.policy_loss(logps, *some)
            loss = loss.mean()
        else:
            place = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
            args = SimpleNamespace(use_bias_correction_kl=False, delta=None)
            metrics = {"train": defaultdict(list)}
            trainer = SimpleNamespace(args=args, accelerator=place, _metrics=metrics, beta=beta)
            high = cfg.clip if clip_high is None else clip_high
            vars(trainer).update(epsilon_low=cfg.clip, epsilon_high=high, loss_type=loss_type)
            vars(trainer).update(importance_sampling_level="token", max_completion_length=9)
            vars(trainer).update(current_gradient_accumulation_steps=1, top_entropy_quantile=1.0)
            for name in ("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled"):
                setattr(trainer, name, False)
            trainer.off_policy_mask_threshold = None
            trainer.model = SimpleNamespace(training=True)
            got = (logps, torch.zeros_like(logps), None)
            trainer._get_per_token_logps_and_entropies = lambda *a, got=got, **k: got
            ids = torch.zeros(6, 9, dtype=torch.long)
            inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
            inputs |= {"completion_mask": sampled.long(), "advantages": advantages}
            inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
            loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        found.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    per_token = lengths.double() / lengths.sum()
    clipped = (means["clipped"] * per_token).sum().item()
    assert clipped == pytest.approx(metrics["train"]["clip_ratio/region_mean"][0]) and clipped > 0
    if beta:
        kl = (means["kl"] * per_token).sum().item()
        assert kl == pytest.approx(metrics["train"]["kl"][0])
