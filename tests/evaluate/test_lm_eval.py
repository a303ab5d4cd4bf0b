"""lm-evaluation-harness on policies: likelihoods, answers, IF-Eval's strict score, the command."""

# ruff: noqa: E402  (the harness is asked for before what imports it)

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, write_model
from tiny_run import XLA_CACHE, copy_of

for package in ("lm_eval", "langdetect", "immutabledict", "nltk"):
    pytest.importorskip(package, reason="lm-eval is an optional extra: requirements-eval.txt")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tiers import HANG

from oel_jax import evaluate as harness
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.evaluate import command as command
from oel_jax.evaluate.command import evaluate_policies, main
from oel_jax.evaluate.likelihood import score
from oel_jax.evaluate.model import PolicyLM, answer_text, generation
from oel_jax.evaluate.responses import Answer, Place, Responses, prompt_digest
from oel_jax.evaluate.results import summarise
from oel_jax.evaluate.tasks import PAPER_IFEVAL, select
from oel_jax.models import bundled
from oel_jax.models.language_model import load_model
from oel_jax.parallel.mesh import make_mesh
from oel_jax.runs.metrics import read_metrics
from oel_jax.sampler.requests import Sampling

pytestmark = pytest.mark.lm_eval

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory) -> Path:
    """A tiny random Qwen3 with a byte-level tokenizer and a chat template; 512 positions."""
    import tokenizers

    directory = write_model(
        tmp_path_factory.mktemp("models") / "chat",
        "qwen3",
        tied=True,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
    )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(CONTROL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the answer is no\nthe answer is yes\n\n user assistant"], trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ends = json.dumps({"eos_token_id": 2, "pad_token_id": 0})
    (directory / "generation_config.json").write_text(ends)
    return directory


@pytest.fixture(scope="module")
def chat_model(chat_dir):
    return load_model(chat_dir)


@pytest.fixture(scope="module")
def nano_model():
    return load_model("nano")


def requests(kind, *arguments, task="t"):
    return [Instance(kind, {}, args, 0, (task, doc, 1)) for doc, args in enumerate(arguments)]


# --- likelihoods ----------------------------------------------------------------------------------


def plain_scores(model, pairs):
    """Float64 over whole logits: (sum of log-probabilities, whether argmax gives all) of each."""
    rows = [[*context, *continuation] for context, continuation in pairs]
    rows += [rows[0]] * (-len(rows) % model.mesh.shape["fsdp"])
    logits = np.asarray(model.logits(rows)).astype(np.float64)
    found = []
    for row, (context, continuation) in zip(logits, pairs, strict=False):
        total, greedy = 0.0, True
        for at, token in enumerate(continuation, len(context) - 1):
            total += row[at, token] - np.log(np.exp(row[at]).sum())
            greedy = greedy and int(row[at].argmax()) == token
        found.append((total, greedy))
    return found


def plain_score(model, context, continuation):
    return plain_scores(model, [(context, continuation)])[0]


def greedy_ids(model, prompt, count):
    """Token after token with whole forward passes; every row is 512 wide: one program."""
    made = []
    while len(made) < count and made[-1:] != [2]:
        rows = [[*prompt, *made], [0] * model.cfg.max_positions]
        logits = np.asarray(model.logits(rows))[0, len(prompt) + len(made) - 1]
        made.append(int(logits[: model.vocab_limit].argmax()))
    return made


@pytest.mark.parametrize("fsdp, tp", [(1, 1), (2, 2)])
def test_scores_equal_one_pair_at_a_time(tiny_models, fsdp, tp):
    mesh = make_mesh(fsdp, tp, jax.devices()[: fsdp * tp])
    model = load_model(tiny_models["qwen3_tied"], mesh=mesh)
    draw = np.random.default_rng(0)
    pairs = [
        (draw.integers(3, 300, size).tolist(), draw.integers(3, 300, count).tolist())
        for size, count in [(1, 1), (1, 30), (50, 1), (17, 16), (16, 17), (3, 0), (40, 9), (9, 2)]
    ]
    best = int(np.asarray(model.logits([pairs[0][0]] * fsdp))[0, -1].argmax())
    pairs.append((pairs[0][0], [best]))
    expected = plain_scores(model, pairs)
    counted = []
    for token_budget in (32, 8192):  # every row alone; all of a bucket together
        scored = score(model, pairs, token_budget=token_budget, done=counted.append)
        np.testing.assert_allclose([s.total for s in scored], [e[0] for e in expected], atol=1e-4)
        assert [s.greedy for s in scored] == [e[1] for e in expected]
    assert sum(counted) == 2 * len(pairs)
    assert [e[1] for e in expected].count(True) == 2  # the empty one and the likeliest one
    with pytest.raises(ValueError, match="without a token"):
        score(model, [([], [1])])


PAIRS = [
    ("the answer is", " no"),
    ("the answer is ", "no"),  # a blank at the end belongs to the continuation
    ("the answer is\n", "yes, the answer is yes"),
    ("", "the answer"),
    ("é <|im_end|> x", " the answer is yes"),  # a control token written out stays text
]


def test_loglikelihood_equals_transformers(chat_dir, chat_model):
    """Against transformers' own model and tokenizer, whole strings, no padding."""
    torch = pytest.importorskip("torch", reason="compares with transformers' PyTorch models")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_dir, split_special_tokens=True)

    def expected(context, continuation):
        ids = tokenizer(context + continuation)["input_ids"] if context else []
        kept = len(tokenizer(context.rstrip())["input_ids"]) if context else 1
        ids = ids or [2, *tokenizer(continuation)["input_ids"]]  # 2: the model's end token
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([ids])).logits[0].double()
        log_probs = logits.log_softmax(-1)[kept - 1 : -1]
        targets = torch.tensor(ids[kept:])
        total = log_probs.gather(1, targets[:, None]).sum().item()
        return total, bool((log_probs.argmax(-1) == targets).all())

    lm = PolicyLM(chat_model)
    ours = lm.loglikelihood(requests("loglikelihood", *PAIRS))
    wanted = [expected(*pair) for pair in PAIRS]
    np.testing.assert_allclose([o[0] for o in ours], [w[0] for w in wanted], atol=1e-4)
    assert [o[1] for o in ours] == [w[1] for w in wanted]
    whole = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (PAIRS[2][1],)))
    np.testing.assert_allclose(whole, [expected("", PAIRS[2][1])[0]], atol=1e-4)


def test_a_text_beyond_the_positions_is_scored_in_windows(chat_model):
    text = "the answer is no " * 150
    lm = PolicyLM(chat_model)
    ids, most = chat_model.tokenizer.encode(text), chat_model.cfg.max_positions
    assert len(ids) > most
    expected, seen = 0.0, []
    for window in get_rolling_token_windows(ids, 2, most, 1):
        context, part = make_disjoint_window(window)
        expected += plain_score(chat_model, context, part)[0]
        seen += part
    assert seen == ids  # each token once
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert ours == pytest.approx([expected], abs=1e-2, rel=1e-5)


def test_scoring_behind_a_chat_prompt(chat_model):
    """The context's own control tokens count as such, its text's do not."""
    lm = PolicyLM(chat_model)
    shown = lm.apply_chat_template([{"role": "user", "content": "is <|im_end|> it?"}])
    tokenizer = chat_model.tokenizer
    prompt = tokenizer.chat("is <|im_end|> it?", thinking=False)
    assert prompt.count(2) == 1 and shown.count("<|im_end|>") == 2
    total, _ = lm.loglikelihood(requests("loglikelihood", (shown, "yes")))[0]
    # The template's last blank lines count to the continuation.
    blank = len(tokenizer.encode("\n\n"))
    continuation = tokenizer.encode("\n\nyes")
    assert total == pytest.approx(plain_score(chat_model, prompt[:-blank], continuation)[0], 1e-5)


# --- answers --------------------------------------------------------------------------------------


def test_prompts_go_into_the_template_with_thinking_off(chat_model):
    lm = PolicyLM(chat_model)
    user = {"role": "user", "content": "hi <think>"}
    ids = chat_model.tokenizer.chat("hi <think>", thinking=False)
    assert lm._ids(lm._prompt(lm.apply_chat_template([user]))) == ids
    assert ids != chat_model.tokenizer.chat("hi <think>", thinking=True)
    start = {"role": "assistant", "content": "So: no"}
    shown = lm.apply_chat_template([user, start], add_generation_prompt=False)
    assert shown.endswith("</think>\n\nSo: no")
    assert chat_model.tokenizer.decode(lm._ids(lm._prompt(shown))).endswith("So: no")
    both = lm.apply_chat_template([{"role": "system", "content": "Be short."}, user])
    assert lm._ids(lm._prompt(both)) == chat_model.tokenizer.chat(
        "Be short.\n\nhi <think>", thinking=False
    )
    with pytest.raises(UserError, match="one user message"):
        lm.apply_chat_template([user, start, user])
    # The same words without the template are plain text.
    assert lm._ids(lm._prompt("<|im_start|>user")).count(1) == 0


def test_an_answer_that_the_templates_thought_left_no_room_for_is_none(chat_model, tmp_path):
    """A template that begins the thought itself, as those of models that always think."""
    directory = tmp_path / "thinker"
    shutil.copytree(chat_model.directory, directory)
    (directory / "chat_template.jinja").write_text(
        "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    responses = Responses()
    lm = PolicyLM(replace(chat_model, directory=directory), responses=responses)
    user, settings = {"role": "user", "content": "hi"}, {"max_gen_toks": 4}
    begun = lm.apply_chat_template([user])
    # The task gives the start of an answer: with the thought's end, or without.
    starts = [
        lm.apply_chat_template([user, {"role": "assistant", "content": text}], False)
        for text in ("hm</think>So: ", "So: ")
    ]
    asked = requests("generate_until", *((p, settings) for p in (begun, *starts, "hi")))
    said = lm.generate_until(asked)
    raw = [answer.response for answer in responses.answers]
    assert sorted(map(bool, raw)) == [True] * 4 and "</think>" not in "".join(raw)
    assert said[0] == said[2] == "" and said[1] in raw and said[3] in raw and said[1] and said[3]


def test_greedy_answers_equal_argmax(chat_model):
    lm = PolicyLM(chat_model)
    prompts = ["the answer is", "no", "yes the answer"]
    encode, decode = chat_model.tokenizer.encode, chat_model.tokenizer.decode
    wanted = [decode(greedy_ids(chat_model, encode(prompt), 9)) for prompt in prompts]
    arguments = {"until": [], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}
    greedy = requests("generate_until", *((prompt, arguments) for prompt in prompts))
    assert lm.generate_until(greedy) == wanted
    stop = wanted[0][3]
    cut = requests("generate_until", (prompts[0], arguments | {"until": stop}))
    assert lm.generate_until(cut) == [wanted[0].partition(stop)[0]]


def test_sampled_answers_depend_on_seed_and_place_alone(nano_model):
    arguments = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    asked = requests("generate_until", *[(f"user {i % 3}", arguments) for i in range(7)])
    together = PolicyLM(nano_model, seed=1).generate_until(asked)
    backwards = PolicyLM(nano_model, seed=1).generate_until(asked[::-1])[::-1]
    assert together == backwards == PolicyLM(nano_model, seed=1).generate_until(asked)
    assert PolicyLM(nano_model, seed=1).generate_until(asked[3:4]) == together[3:4]
    assert PolicyLM(nano_model, seed=2).generate_until(asked) != together
    assert together[0] != together[3]  # the same prompt, another document
    twice = PolicyLM(nano_model, seed=1).generate_until([asked[0], asked[0]])
    assert twice[0] == together[0] != twice[1]  # an answer that a task asks for several times


def test_reading_generation_arguments():
    assert generation(PAPER_IFEVAL | {"max_gen_toks": 1280}, "t").how == Sampling(0.7, 20, 0.8)
    assert generation({"temperature": 0.5}, "t").how == Sampling(0.5, 0, 1.0)
    assert generation({"temperature": 0.5, "do_sample": False}, "t").how == Sampling(0.0)
    assert generation({"do_sample": True}, "t").how == Sampling(1.0, 0, 1.0)
    assert generation({}, "t") == generation({"until": None, "max_gen_toks": 256}, "t")
    found = generation({"until": ["a", ""], "max_new_tokens": 3, "num_beams": 1, "min_p": 0}, "t")
    assert (found.until, found.max_new) == (("a",), 3)
    for wrong in ({"num_beams": 4}, {"typical_p": 0.9}, {"temperature": -1}, {"max_gen_toks": 0}):
        with pytest.raises(UserError, match="task t asks for"):
            generation(wrong, "t")
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}):
        with pytest.raises(UserError, match="must be"):
            generation({"temperature": 1.0, **wrong}, "t")


@pytest.mark.parametrize(
    "raw, answer",
    [
        ("no thought", "no thought"),
        ("  kept as it is\n", "  kept as it is\n"),
        ("<think>\nhm\n</think>\n\nthe answer", "the answer"),
        ("hm</think>a</think>b", "b"),
        ("<think>never finished", ""),
        ("a STOP b", "a "),
        ("<think> STOP </think>a", "a"),  # a stop text inside a thought is none
    ],
)
def test_thoughts_and_stop_texts_are_cut(raw, answer):
    assert answer_text(raw, ["STOP"], opened=False) == answer


@pytest.mark.parametrize(
    "raw, answer",
    [("cut off", ""), ("hm</think>\n\na STOP b", "a "), ("STOP</think>a</think> b", "b"), ("", "")],
)
def test_thoughts_that_the_template_has_begun(raw, answer):
    assert answer_text(raw, ["STOP"], opened=True) == answer


def test_too_long_prompts_are_refused_or_lose_their_beginning(chat_model):
    most = chat_model.cfg.max_positions
    long = "the answer is no " * 150
    asked = requests("generate_until", (long, {"max_gen_toks": 4}), ("no", {"max_gen_toks": 4}))
    with pytest.raises(UserError, match="--truncate_prompts"):
        PolicyLM(chat_model).generate_until(asked)
    lm = PolicyLM(chat_model, truncate=True)
    lm.generate_until(asked)
    assert lm.truncated == 1
    kept = chat_model.tokenizer.encode(long)[-(most - 4) :]
    raw = lm.responses.find(Place("t", 0, 0, 0), prompt_digest(kept)).response
    assert raw == chat_model.tokenizer.decode(greedy_ids(chat_model, kept, 4))
    with pytest.raises(UserError, match="task t has a prompt"):
        PolicyLM(chat_model).loglikelihood(requests("loglikelihood", (long, " yes")))
    lm.loglikelihood(requests("loglikelihood", (long, " yes")))
    assert lm.truncated == 2


def test_the_harness_can_make_the_model_by_name(chat_dir):
    import lm_eval

    task = {
        "task": "inline",
        "custom_dataset": lambda **_: {"test": _dataset([{"q": "the answer is"}] * 3)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        model="oel_jax",
        model_args=f"path={chat_dir},dtype=float32",
        tasks=[task],
        torch_random_seed=None,
    )
    assert found["n-samples"]["inline"]["effective"] == 3
    with pytest.raises(UserError, match="model_args"):
        PolicyLM.create_from_arg_string("pretrained=x")


def _dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


# --- responses ------------------------------------------------------------------------------------


def test_responses_survive_a_torn_line_and_other_settings_drop_them(tmp_path):
    file = tmp_path / "r.jsonl"
    kept = Responses(file, {"seed": 1})
    odd = Answer("line\u2028break \ud800 \n", 3, True)
    kept.add(Place("t", 0, 0), "aa", odd)
    kept.add(Place("t", 1, 0), "bb", Answer("y", 1, False))
    kept.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    again = Responses(file, {"seed": 1})
    again.close()
    assert again.find(Place("t", 0, 0), "aa") == odd
    assert again.find(Place("t", 0, 0), "another prompt") is None
    assert again.find(Place("t", 1, 0), "bb") is None
    assert file.read_bytes() == whole[: whole.index(b'{"task": "t", "doc": 1')]
    other = Responses(file, {"seed": 2})
    other.close()
    assert other.answers == []


# --- IF-Eval --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ifeval_data():
    place = REPOSITORY.parent / "shared" / "ifeval"
    if not (place / "input_data.jsonl").is_file():
        pytest.skip("IF-Eval's prompts are not in ../shared/ifeval")
    return place


@pytest.fixture(scope="module")
def ifeval(ifeval_data):
    return select(["ifeval"], ifeval_data=ifeval_data)[0]


class Scripted(Responses):
    """Every answer is there already, so that nothing is sampled."""

    def __init__(self, texts):
        super().__init__()
        self._texts = texts

    def find(self, place, digest):
        return Answer(self._texts[place.doc], 1, True)


RESPONSES = {
    "a fixed text": lambda prompt: "This is a fixed answer.",
    "the prompt itself": lambda prompt: prompt,
    "upper case": lambda prompt: prompt.upper() + "\n\nP.S. DONE",
    "lower case without commas": lambda prompt: prompt.lower().replace(",", ""),
    "a list with a title": lambda prompt: (
        "<<Title>>\n\n* one *two*\n* three\n\n***\n\nSECTION 1 [a] [b]\n\n"
        + "Wörter und Sätze. " * 150
        + "P.S. bye"
    ),
    "nothing": lambda prompt: "  ",
    "JSON": lambda prompt: '```json\n{"answer": "' + prompt[:20].replace('"', "") + '"}\n```',
}


def checkers_alone(ifeval_data, texts, seed=42):
    """Strict flags of the harness's checkers, called without the harness around them."""
    from lm_eval.tasks.ifeval import utils

    rows = [json.loads(line) for line in (ifeval_data / "input_data.jsonl").open(encoding="utf-8")]
    random.seed(seed)
    flags = []
    for row, text in zip(rows, texts, strict=True):
        example = utils.InputExample(**row)
        flags.append(utils.test_instruction_following_strict(example, text).follow_all_instructions)
        # One checker draws a letter at random; it is drawn here as often as by the task.
        utils.test_instruction_following_loose(example, text)
    return flags


@pytest.mark.parametrize("kind", RESPONSES)
def test_the_strict_score_is_that_of_the_public_checkers(ifeval, ifeval_data, nano_model, kind):
    rows = [json.loads(line) for line in (ifeval_data / "input_data.jsonl").open(encoding="utf-8")]
    texts = [RESPONSES[kind](row["prompt"]) for row in rows]
    ifeval.seed()
    expected = checkers_alone(ifeval_data, texts)
    # A thought in front must not change anything.
    raw = ["<think>\nNo, no.\n</think>\n\n" + t if i % 2 else t for i, t in enumerate(texts)]
    lm = PolicyLM(nano_model, truncate=True, responses=Scripted(raw))
    ifeval.seed()
    found = evaluate(lm, ifeval.loaded, apply_chat_template=True)
    result = summarise("ifeval", found, [], lm.truncated)
    flags = result["per_sample"]["ifeval"]["prompt_level_strict_acc,none"]
    assert flags == "".join("01"[flag] for flag in expected) and len(flags) == 541
    (headline,) = result["scores"]
    assert headline["metric"] == "prompt_level_strict_acc" and headline["n"] == 541
    assert headline["value"] == pytest.approx(sum(expected) / 541)
    low, high = headline["ci95"]
    assert low <= headline["value"] <= high
    if kind == "a fixed text":
        p = headline["value"]
        assert headline["stderr"] == pytest.approx((p * (1 - p) / 540) ** 0.5)
        assert high - low == pytest.approx(2 * 1.9643 * headline["stderr"], rel=0.02)
        assert 30 < sum(expected) < 150
    if kind == "nothing":
        assert sum(expected) == 0


def test_the_papers_setting(ifeval):
    settings = ifeval.settings["generation"]["ifeval"]
    assert {name: settings[name] for name in PAPER_IFEVAL} == PAPER_IFEVAL
    assert settings["max_gen_toks"] == 1280 and ifeval.settings["seed"] == 42
    assert ifeval.settings["chat_template"] is True
    digest = "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49"
    assert ifeval.settings["data_sha256"] == digest


def test_the_language_detector_is_seeded(ifeval):
    import langdetect

    text = "Ja is no y si da 123"  # ambiguous: an unseeded detector changes its mind
    seen = set()
    for _ in range(20):
        ifeval.seed()
        seen.add(str(langdetect.detect_langs(text)))
    assert len(seen) == 1
    langdetect.DetectorFactory.seed = None
    assert len({str(langdetect.detect_langs(text)) for _ in range(20)}) > 1
    ifeval.seed()


# --- tasks of one's own ---------------------------------------------------------------------------

DATA = """
import datasets

def rows(**_):
    docs = [{"q": f"the answer {i}", "choices": ["no", "yes", "a b"], "gold": i % 3}
            for i in range(6)]
    return {"test": datasets.Dataset.from_list(docs)}
"""
COMMON = "custom_dataset: !function data.rows\ntest_split: test\nmetadata:\n  version: 1.0\n"
OWN = {
    "own_choice": COMMON
    + "task: own_choice\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
    + "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n"
    + "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    + "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n",
    "own-Text": COMMON
    + "task: own-Text\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    + "doc_to_target: '{{q}}'\nmetric_list:\n  - metric: byte_perplexity\n",
    "own_beams": COMMON
    + "task: own_beams\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
    + "doc_to_target: '{{q}}'\ngeneration_kwargs:\n  num_beams: 4\n",
    "own_both": "group: own_both\ntask:\n  - own_choice\n  - own_second\n"
    + "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n",
    "own_second": COMMON
    + "task: own_second\noutput_type: multiple_choice\ndoc_to_text: '{{q}}?'\n"
    + "doc_to_target: 1\ndoc_to_choice: choices\nmetric_list:\n"
    + "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
    "own_unsafe": COMMON
    + "task: own_unsafe\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
    + "doc_to_target: '{{q}}'\nunsafe_code: true\n",
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "data.py").write_text(DATA)
    for name, text in OWN.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def test_multiple_choice_and_perplexity_follow_from_plain_scores(chat_model, own_tasks):
    choice, text = select(["own_choice", "own-Text"], include=own_tasks, chat=False)
    model, tokenizer = chat_model, chat_model.tokenizer
    found = evaluate(PolicyLM(model), choice.loaded)
    result = summarise("own_choice", found, [], 0)
    right = ""
    for doc in range(6):
        totals = []
        for answer in ("no", "yes", "a b"):
            context = tokenizer.encode(f"the answer {doc}")
            whole = tokenizer.encode(f"the answer {doc} {answer}")
            totals.append(plain_score(model, context, whole[len(context) :])[0])
        right += "01"[int(np.argmax(totals)) == doc % 3]
    assert result["per_sample"]["own_choice"]["acc,none"] == right
    assert result["scores"][0]["value"] == pytest.approx(right.count("1") / 6)
    assert "response_tokens" not in result

    result = summarise("own-Text", evaluate(PolicyLM(model), text.loaded), [], 0)
    documents = [f"the answer {doc}" for doc in range(6)]
    total = sum(plain_score(model, [2], tokenizer.encode(one))[0] for one in documents)
    expected = np.exp(-total / sum(map(len, documents)))
    assert result["scores"][0]["value"] == pytest.approx(expected, rel=1e-4)


def test_a_group_has_one_score_and_its_tasks(chat_model, own_tasks):
    (group,) = select(["own_both"], include=own_tasks, chat=False)
    result = summarise("own_both", evaluate(PolicyLM(chat_model), group.loaded), [], 0)
    (headline,) = result["scores"]
    each = {m["task"]: m["value"] for m in result["metrics"] if m["metric"] == "acc"}
    assert headline["task"] == "own_both" and headline["n"] == 12
    assert headline["value"] == pytest.approx((each["own_choice"] + each["own_second"]) / 2)
    assert set(result["per_sample"]) == {"own_choice", "own_second"}


@pytest.mark.parametrize(
    "names, fields, message",
    [
        (["ifevl"], {}, "--lm_eval_tasks.*no task 'ifevl'; did you mean ifeval"),
        ([], {}, "--lm_eval_tasks="),
        (["ifeval", "ifeval"], {}, "give each name once"),
        (["own_beams"], {}, "num_beams=4"),
        (["own_unsafe"], {}, "own_unsafe runs code that the model writes"),
        (["own_choice"], {"sampling": {"top_k": 3}}, "--top_k: none of --lm_eval_tasks"),
        (["own_choice"], {"ifeval_data": Path("x")}, "--ifeval_data is for task ifeval"),
        (["ifeval"], {"ifeval_data": Path("nowhere")}, "input_data.jsonl is missing"),
        (["own_choice"], {"include": Path("nowhere")}, "--lm_eval_include=nowhere is no directory"),
    ],
)
def test_what_cannot_be_done_is_refused(own_tasks, names, fields, message):
    with pytest.raises(UserError, match=message):
        select(names, **{"include": own_tasks} | fields)


def test_damaged_prompts_are_refused_with_their_line(tmp_path, ifeval_data):
    shutil.copytree(ifeval_data, tmp_path / "data")
    file = tmp_path / "data" / "input_data.jsonl"
    file.chmod(0o644)
    file.write_text(file.read_text(encoding="utf-8") + '{"key": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="input_data.jsonl:542 is not a prompt of IF-Eval"):
        select(["ifeval"], ifeval_data=tmp_path / "data")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    return make_mesh(1, 1, jax.devices()[:1])


def short_ifeval(ifeval_data, **fields):
    fields = {"sampling": {"max_gen_toks": 4}, "limit": 12} | fields
    return select(["ifeval"], ifeval_data=ifeval_data, **fields)


def files_of(workdir):
    return [workdir / "evaluate", workdir / "round_001" / "evaluate"]


def test_all_policies_are_evaluated_once_and_results_are_kept(
    finished_run, tmp_path, ifeval_data, mesh, monkeypatch
):
    workdir = copy_of(finished_run, tmp_path / "run")
    selection = short_ifeval(ifeval_data)
    results = evaluate_policies(workdir, selection, mesh=mesh)
    assert list(results) == [(0, "ifeval"), (1, "ifeval")]
    for place, (number, _) in zip(files_of(workdir), results, strict=True):
        result = read_json(place / "lm_eval_ifeval.json")
        assert result == results[number, "ifeval"]
        flags = result["per_sample"]["ifeval"]["prompt_level_strict_acc,none"]
        assert len(flags) == result["scores"][0]["n"] == 12
        assert result["scores"][0]["value"] == pytest.approx(flags.count("1") / 12)
        answers = (place / "lm_eval_ifeval.responses.jsonl").read_text().splitlines()[1:]
        tokens = [json.loads(line)["tokens"] for line in answers]
        assert result["response_tokens"] == pytest.approx(np.mean(tokens)) and max(tokens) <= 4
        row = [
            r for r in read_metrics(workdir / "metrics.jsonl") if r["stage"] == "lm_eval_ifeval"
        ][number]
        assert (row["round"], row["step"]) == (number, number)
        assert row["values"]["prompt_level_strict_acc"] == result["scores"][0]["value"]
    table = command.report(results)
    assert "after round 1" in table and "prompt_level_strict_acc" in table

    monkeypatch.setattr(command, "load_model", None)  # a finished policy is not even loaded
    assert evaluate_policies(workdir, selection, mesh=mesh) == results
    with pytest.raises(UserError, match=r"lm_eval_ifeval.json was made with other settings \(seed"):
        evaluate_policies(workdir, short_ifeval(ifeval_data, seed=43), mesh=mesh)
    one = evaluate_policies(workdir, selection, mesh=mesh, round_number=1)
    assert list(one) == [(1, "ifeval")]


def test_a_stopped_evaluation_goes_on_and_ends_the_same(
    finished_run, tmp_path, ifeval_data, mesh, monkeypatch
):
    workdir = copy_of(finished_run, tmp_path / "run")
    selection = short_ifeval(ifeval_data)
    file = workdir / "evaluate" / "lm_eval_ifeval.json"
    answers = file.with_suffix(".responses.jsonl")

    class Killed(Exception):
        pass

    add, made = Responses.add, []

    def counting(self, place, *rest, last=None):
        if last is not None and len(made) == last:
            raise Killed
        made.append(place.doc)
        add(self, place, *rest)

    def stopping(self, place, *rest):
        counting(self, place, *rest, last=5)

    monkeypatch.setattr(Responses, "add", stopping)
    with pytest.raises(Killed):
        evaluate_policies(workdir, selection, mesh=mesh, round_number=0)
    assert not file.exists()
    answers.write_bytes(answers.read_bytes() + b'{"task": "ifev')  # torn by the kill
    monkeypatch.setattr(Responses, "add", counting)
    evaluate_policies(workdir, selection, mesh=mesh, round_number=0)
    assert sorted(made) == list(range(12))  # each answer was sampled once
    resumed = file.read_bytes()

    other = copy_of(finished_run, tmp_path / "other")
    evaluate_policies(other, selection, mesh=mesh, round_number=0)
    assert (other / "evaluate" / "lm_eval_ifeval.json").read_bytes() == resumed


def test_a_policy_made_anew_is_not_taken_for_the_old_one(finished_run, tmp_path, ifeval_data, mesh):
    workdir = copy_of(finished_run, tmp_path / "run")
    selection = short_ifeval(ifeval_data, limit=2)
    evaluate_policies(workdir, selection, mesh=mesh, round_number=1)
    manifest = json.loads((workdir / "manifest.json").read_text())
    for entry in manifest["stages"]:
        if entry["stage"] == "consolidate":
            entry["files"][0]["sha256"] = "0" * 64
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"other settings \(policy\)"):
        evaluate_policies(workdir, selection, mesh=mesh, round_number=1)


def test_names_with_odd_letters_make_plain_file_names(finished_run, tmp_path, own_tasks, mesh):
    workdir = copy_of(finished_run, tmp_path / "run")
    selection = select(["own-Text"], include=own_tasks, chat=False)
    evaluate_policies(workdir, selection, mesh=mesh, round_number=1)
    result = read_json(workdir / "round_001" / "evaluate" / "lm_eval_own_x2d__x54_ext.json")
    assert result["name"] == "own-Text" and result["scores"][0]["metric"] == "byte_perplexity"


def test_all_541_prompts_without_network_or_torch(finished_run, tmp_path, ifeval_data):
    """The command as a user runs it, with nothing in reach but the directory it is given."""
    workdir = copy_of(finished_run, tmp_path / "run")
    arguments = [f"--workdir={workdir}", "--lm_eval_tasks=ifeval", f"--ifeval_data={ifeval_data}"]
    arguments += ["--round=1", "--max_gen_toks=2"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['evaluate', *{arguments!r}]\n"
        "try:\n    runpy.run_module('oel_jax.evaluate', run_name='__main__')\n"
        "except SystemExit as end:\n    print('exit', end.code, 'torch' in sys.modules)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NLTK", "HF_"))}
    environment = kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "HOME": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": XLA_CACHE,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "NLTK_DATA": str(tmp_path / "no_tables"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert "exit 0 False" in done.stdout, done.stdout + done.stderr
    assert "541 answers hit" in done.stdout or "answers hit --max_gen_toks" in done.stdout
    result = read_json(workdir / "round_001" / "evaluate" / "lm_eval_ifeval.json")
    assert len(result["per_sample"]["ifeval"]["prompt_level_strict_acc,none"]) == 541
    assert not (workdir / "evaluate" / "lm_eval_ifeval.json").exists()  # --round=1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lm_eval_tasks=ifevl"], "no task 'ifevl'"),
        (["--lm_eval_tasks=ifeval", "--round=7"], "round 7 has no policy"),
        (["--lm_eval_tasks=ifeval", "--round=-1"], "--round=-1"),
        (["--lm_eval_tasks=ifeval", "--limit=0"], "--limit=0"),
        (["--lm_eval_tasks=ifeval", "--top_p=0"], "--top_p=0.0: it must be above 0 and at most 1"),
        (["--lm_eval_tasks=ifeval", "--temperature=-1"], "--temperature=-1.0"),
        (["--lm_eval_tasks=ifeval", "--fsdp=3"], "here with --fsdp and --tp"),
    ],
)
def test_bad_flags_fail_before_a_model_is_loaded(finished_run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(command, "load_model", None)
    devices = [] if any("fsdp" in flag for flag in flags) else ["--fsdp=8"]
    assert main([f"--workdir={finished_run}", *flags, *devices]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_a_task_that_asks_too_much_of_the_model(finished_run, tmp_path, ifeval_data, mesh):
    workdir = copy_of(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="answers of up to 4000 tokens.*--max_gen_toks"):
        long = short_ifeval(ifeval_data, sampling={"max_gen_toks": 4000})
        evaluate_policies(workdir, long, mesh=mesh)
    shutil.copytree(bundled.MODEL_DIR, tmp_path / "base")
    config = read_json(tmp_path / "base" / "tokenizer_config.json")
    del config["chat_template"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    stored = read_json(workdir / "config.json")
    stored["model"]["path"] = str(tmp_path / "base")
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="no chat template.*--no-chat_template"):
        evaluate_policies(workdir, short_ifeval(ifeval_data), mesh=mesh, round_number=0)


def test_no_run_and_no_harness(tmp_path, finished_run, capsys, monkeypatch):
    assert main([f"--workdir={tmp_path / 'none'}", "--lm_eval_tasks=ifeval"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    absent = {"lm_eval", "langdetect"}
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name in absent else object())
    assert main([f"--workdir={finished_run}", "--lm_eval_tasks=ifeval"]) == 2
    shown = capsys.readouterr().err
    assert "needs lm_eval, langdetect" in shown and "requirements-eval.txt" in shown
