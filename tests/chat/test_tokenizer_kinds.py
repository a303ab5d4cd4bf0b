"""Every kind of tokenizer.json: prompts and decoded text as in transformers, or refused by name."""

import json
import random
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from oel_jax.base.errors import UserError
from oel_jax.chat.tokenizer import load_tokenizer

CONTROL = ("<unk>", "<s>", "</s>", "<|user|>", "<|bot|>", "<think>", "</think>")
# Control tokens with text, blanks and lines on either side, and with nothing between them.
TEMPLATES = {
    "tokens": (
        "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}<|bot|>"
    ),
    "lines": (
        "{{ bos_token }}<|user|>\n{{ messages[0].content }}</s>\n<|bot|>\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    ),
    "words": "You  are [INST] {{ messages[0].content }} [/INST]",
    "spaced": "{{ bos_token }}  <|user|> {{ messages[0].content }} </s> \n <|bot|> ",
    "trimmed": "{{ bos_token }} {{ messages[0].content | trim }}\n\n</s><|bot|> a",
}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "go up",
    " go up ",
    "  two  blanks \n\n and lines\n",
    "\n\n[up]",
    "\tNo. 12345, it's 56!\n ",
    "Äé e\u0301 √ 中文 한국어 \U0001f600\U0001f468\u200d\U0001f469 ﬁ ½\u3000x\u3000",
    "\u2581 \u2581a",
    "x",
    " ",
    "",
    "\x1c a \x85\xa0",
    "a<b>c|d>",
]


def random_texts(count: int) -> list[str]:
    draw = random.Random(7)
    letters = list("aeginoptuwABG 019.,!'\n\t  <|>/_[]\u2581é½\u3000中\U0001f600\u0301")
    return ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(count)]


def write(directory: Path, backend: Tokenizer, template: str, control=(), **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.add_tokens([token for token in control if not token.special])
    backend.add_special_tokens([token for token in control if token.special])
    backend.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = (
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | roles | config
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def differences(directory: Path, texts=None, load=transformers.PreTrainedTokenizerFast) -> list:
    """Texts whose prompt, ids or decoded prefixes are not those of transformers."""
    ours = load_tokenizer(directory)
    theirs = load.from_pretrained(directory)
    found = []
    for text in TEXTS + random_texts(40) if texts is None else texts:
        message = [{"role": "user", "content": text}]
        for thinking in (True, False):
            ids = theirs.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
            )
            if ours.chat(text, thinking=thinking) != ids:
                found.append(text)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ours.encode(text) != ids:
            found.append(text)
        kept = [i for i in ids if i not in ours.control]
        for count in range(len(kept) + 1):  # a response as it grows
            shown = theirs.decode(kept[:count], skip_special_tokens=True)
            if ours.decode(kept[:count]) != shown:
                found.append(text)
    return found


# ---------------------------------------------------------------- kinds

CORPUS = [
    "You are the player; go up or down to the goal. 12 34 it's a trap!",
    "Go left, then right, and up again: [up] [down] é ü 中文 ½",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = [
    AddedToken(text, normalized=False, special=text[1:] not in ("think>", "/think>"))
    for text in CONTROL
]


def bpe(
    *, byte_level=True, normalizer=None, pre_tokenizer=None, decoder=None, **options
) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>", **options))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder or decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet() if byte_level else []
    special = [] if byte_level else [*TOKENS, *(AddedToken(b, special=False) for b in BYTES)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if not byte_level:  # the bytes are pieces of the vocabulary, not added tokens
        data = json.loads(backend.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in BYTES]
        backend = Tokenizer.from_str(json.dumps(data))
    return backend


LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def llama(**parts) -> Tokenizer:
    return bpe(byte_level=False, decoder=LLAMA_DECODER, byte_fallback=True, fuse_unk=True, **parts)


def legacy_llama() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return llama(normalizer=normalizer)


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=TOKENS, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=TOKENS, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def unigram(scheme: str, normalizer=None) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer or normalizers.NFKC()
    backend.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=TOKENS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 9, trainer)
    return backend


def byte_level(prefix: bool = False, use_regex: bool = True) -> pre.PreTokenizer:
    return pre.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


KINDS = {
    "byte_level": lambda: bpe(pre_tokenizer=byte_level()),
    "byte_level_prefix_space": lambda: bpe(pre_tokenizer=byte_level(prefix=True)),
    "qwen": lambda: bpe(
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre.Sequence(
            [pre.Split(Regex(QWEN), "isolated"), byte_level(use_regex=False)]
        ),
    ),
    "llama3_ignore_merges": lambda: bpe(
        pre_tokenizer=pre.Sequence(
            [pre.Split(Regex(QWEN), "isolated"), byte_level(use_regex=False)]
        ),
        ignore_merges=True,
    ),
    "digits": lambda: bpe(
        pre_tokenizer=pre.Sequence([pre.Digits(individual_digits=True), byte_level()])
    ),
    "metaspace_always": lambda: llama(pre_tokenizer=pre.Metaspace(prepend_scheme="always")),
    "metaspace_first": lambda: llama(pre_tokenizer=pre.Metaspace(prepend_scheme="first")),
    "metaspace_first_whole": lambda: llama(
        pre_tokenizer=pre.Metaspace(prepend_scheme="first", split=False)
    ),
    "metaspace_first_inside": lambda: llama(
        pre_tokenizer=pre.Sequence([pre.Digits(), pre.Metaspace(prepend_scheme="first")])
    ),
    "metaspace_never": lambda: llama(pre_tokenizer=pre.Metaspace(prepend_scheme="never")),
    "llama_legacy": legacy_llama,
    "whitespace_words": word_level,
    "word_piece": word_piece,
    "unigram_always": lambda: unigram("always"),
    "unigram_first": lambda: unigram("first"),
    "nfkc": lambda: bpe(normalizer=normalizers.NFKC(), pre_tokenizer=byte_level()),
    "lowercase": lambda: bpe(normalizer=normalizers.Lowercase(), pre_tokenizer=byte_level()),
    "strip": lambda: bpe(normalizer=normalizers.Strip(), pre_tokenizer=byte_level()),
    "replace": lambda: bpe(normalizer=normalizers.Replace("a", "  "), pre_tokenizer=byte_level()),
    "strip_then_first": lambda: llama(
        normalizer=normalizers.Strip(), pre_tokenizer=pre.Metaspace(prepend_scheme="first")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_as_in_transformers(kind, tmp_path):
    backend = KINDS[kind]()
    for name, template in TEMPLATES.items():
        write(tmp_path / name, backend, template, TOKENS)
        assert differences(tmp_path / name) == [], (kind, name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("metaspace_first_whole", "LlamaTokenizer"),
        ("llama_legacy", "LlamaTokenizer"),
        ("qwen", "Qwen2Tokenizer"),
        ("byte_level", "GPT2Tokenizer"),
        ("digits", "LlamaTokenizerFast"),  # as the R1 distillations name theirs
    ],
)
def test_directories_that_transformers_has_written(kind, name, tmp_path):
    """Its classes put their own parts in the place of the file's; then the file has them."""
    directory = write(
        tmp_path / "a", KINDS[kind](), TEMPLATES["lines"], TOKENS, tokenizer_class=name
    )
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "b")
    assert differences(tmp_path / "b", load=transformers.AutoTokenizer) == []


def test_the_comparison_sees_a_blank_too_many(tmp_path, monkeypatch):
    """The mistake that Llama-2's tokenizer showed: each piece encoded as if it were the first."""
    from oel_jax.chat.tokenizer import HuggingFaceTokenizer

    write(tmp_path, KINDS["metaspace_first"](), TEMPLATES["tokens"], TOKENS)
    encode = HuggingFaceTokenizer.encode
    monkeypatch.setattr(
        HuggingFaceTokenizer, "encode", lambda self, text, first=True: encode(self, text)
    )
    with pytest.raises(UserError, match="pre_tokenizer Metaspace.* makes other ids of a prompt"):
        load_tokenizer(tmp_path).chat("go up", thinking=True)


# ---------------------------------------------------------------- added tokens

FLAGS_OFF = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
FLAGS = [(), ("lstrip",), ("rstrip",), ("lstrip", "rstrip"), ("single_word",)]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first", "llama_legacy"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_added_tokens(tmp_path, kind, special, flags):
    backend = KINDS[kind]()
    user, bot = (
        AddedToken(text, special=special, normalized=False, **dict.fromkeys(flags, True))
        for text in ("<USR>", "<BOT>")
    )
    templates = [
        "{{ bos_token }}<USR>{{ messages[0].content }}<BOT>",
        "{{ bos_token }} <USR> {{ messages[0].content }} \n<BOT>\n",
        "a<USR>b <USR>\n\n<BOT> <BOT> <BOT>{{ messages[0].content }}<BOT>.",
    ]
    for number, template in enumerate(templates):
        write(tmp_path / str(number), backend, template, [*TOKENS, user, bot])
        assert differences(tmp_path / str(number)) == []


def test_the_longest_token_wins_and_normalised_ones_come_last(tmp_path):
    tokens = [
        *TOKENS,
        AddedToken("<|u", normalized=True),
        AddedToken("<|us", normalized=False),
        AddedToken("|user|>x", normalized=False),
        AddedToken("<|user|>xy", normalized=True),
    ]
    template = "<|user|>xy<|u<|us<|use|user|>x{{ messages[0].content }}<|u"
    write(tmp_path, KINDS["byte_level"](), template, tokens)
    assert differences(tmp_path) == []


NORMALISED = [AddedToken(text, normalized=True, special=True) for text in CONTROL]


@pytest.mark.parametrize("kind", ["byte_level", "qwen", "metaspace_first"])
def test_tokens_that_are_matched_after_normalising(tmp_path, kind):
    tokens = [*NORMALISED, AddedToken("<END>", normalized=True)]
    write(tmp_path, KINDS[kind](), TEMPLATES["lines"] + "<END>", tokens)
    assert differences(tmp_path) == []


@pytest.mark.parametrize("kind", ["llama_legacy", "strip"])
def test_tokens_that_a_normaliser_hides_are_refused_by_name(tmp_path, kind):
    late = AddedToken("<END>", normalized=True, special=True)
    write(tmp_path, KINDS[kind](), "<END>" + TEMPLATES["words"] + " <END> a", [*TOKENS, late])
    tokenizer = load_tokenizer(tmp_path)
    message = r"normalizer .* makes other ids of a prompt .*<END> are matched after normalising"
    with pytest.raises(UserError, match=message):
        tokenizer.chat("go up", thinking=True)


def test_blanks_that_are_added_tokens_are_text(tmp_path):
    """Some vocabularies add runs of blanks as tokens; text must still be made of them."""
    blanks = [AddedToken(text, normalized=False) for text in ("\n\n", "  ", "    ", "\t\t", "▁▁")]
    for kind in ("byte_level", "metaspace_first"):
        directory = write(tmp_path / kind, KINDS[kind](), TEMPLATES["lines"], TOKENS + blanks)
        tokenizer = load_tokenizer(directory)
        assert len(tokenizer.control) == len(CONTROL)
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        assert {t["id"] for t in added if t["content"] == "▁▁"} < set(tokenizer.encode("a▁▁b"))
        texts = ["a\n\nb", "  a    b\t\t", "\n\n\n a", *random_texts(40)]
        assert differences(directory, texts) == []


def test_later_files_name_tokens_too(tmp_path):
    backend = KINDS["byte_level"]()
    template = "{{ bos_token }}<A>{{ messages[0].content }}<B> go</s>"
    plain = write(tmp_path / "plain", backend, template)
    size = load_stopping(plain).vocab_size
    late = {"content": "<A>", "lstrip": False, "rstrip": True, "normalized": False}
    late |= {"single_word": False, "special": True}
    named = {"bos_token": "go", "eos_token": "up", "additional_special_tokens": ["▁a"]}
    # In tokenizer_config.json; it also changes the flags of a token that is known already.
    directory = write(
        tmp_path / "config", backend, template,
        [AddedToken("<A>", normalized=False, rstrip=False)],
        added_tokens_decoder={str(size): late}, **named,
    )  # fmt: skip
    assert differences(directory, [" a", "a b"]) == []
    # In the files that older versions wrote.
    directory = write(tmp_path / "older", backend, template, bos_token="up", eos_token="up")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "go"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert differences(directory, [" a", "a b"]) == []


def load_stopping(directory: Path):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    return load_tokenizer(directory)


def test_a_named_token_that_the_tokenizer_lacks_is_refused_where_it_is_shown(tmp_path):
    write(tmp_path, KINDS["byte_level"](), TEMPLATES["words"], TOKENS, bos_token="<nowhere>")
    assert load_tokenizer(tmp_path).chat("x", thinking=True)
    write(tmp_path, KINDS["byte_level"](), TEMPLATES["tokens"], TOKENS, bos_token="<nowhere>")
    with pytest.raises(UserError, match="shows '<nowhere>', the bos_token of tokenizer_config"):
        load_tokenizer(tmp_path).chat("x", thinking=True)


def test_control_tokens_that_merges_lead_to_cannot_be_reached(tmp_path):
    backend = bpe(pre_tokenizer=byte_level(use_regex=False))
    write(tmp_path, backend, TEMPLATES["tokens"], TOKENS)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    size = len(data["model"]["vocab"])
    pieces = {text: size + i for i, text in enumerate(("</", "s>", "</s>", "</s>a"))}
    data["model"]["vocab"] |= pieces
    data["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], ["</s>", "a"]]
    data["added_tokens"] = [{"id": pieces["</s>"], "content": "</s>", "special": True} | FLAGS_OFF]
    file.write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (pieces["</s>"],)
    assert tokenizer.encode("</s>") == [pieces["</"], pieces["s>"]]
    assert {pieces["</s>"], pieces["</s>a"]}.isdisjoint(tokenizer.encode("</s>a"))
    assert tokenizer.decode(tokenizer.encode("</s>a")) == "</s>a"


def test_words_split_at_random_are_refused(tmp_path):
    write(tmp_path, KINDS["byte_level"](), TEMPLATES["tokens"], TOKENS)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["dropout"] = 0.1
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"model\.dropout 0\.1"):
        load_tokenizer(tmp_path)


def test_clean_up_of_decoded_text(tmp_path):
    texts = ["it's up , ' a ' . is n't !", "a  ?b"]
    for kind in ("word_piece", "byte_level"):
        directory = write(
            tmp_path / kind, KINDS[kind](), TEMPLATES["tokens"], TOKENS,
            clean_up_tokenization_spaces=True,
        )  # fmt: skip
        assert differences(directory, texts) == []


def test_a_post_processor_adds_nothing(tmp_path):
    from tokenizers import processors

    backend = KINDS["byte_level"]()
    backend.add_special_tokens(TOKENS)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))],
    )
    write(tmp_path, backend, TEMPLATES["tokens"])
    assert differences(tmp_path) == []
