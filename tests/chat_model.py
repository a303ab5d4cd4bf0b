"""A tiny random model whose tokenizer has one id a byte and whose template knows tools."""

import json
from pathlib import Path

from conftest import write_model

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def write_tokenizer(directory: Path) -> None:
    """Tokenizer files: one id for each byte, 261 in all; the control tokens are 0 to 4."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + len(CONTROL),
        special_tokens=list(CONTROL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_chat_model(directory: Path) -> Path:
    """A whole model directory; 512 positions."""
    write_model(directory, "qwen3", tied=True)
    write_tokenizer(directory)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    return directory


def write_chain_model(directory: Path, pieces: tuple[str, ...]) -> Path:
    """A model that always answers with these pieces of text, each of them one token.

    Its blocks add nothing, so that the next token depends on the last one alone: the newline that
    ends a prompt leads to the first piece, the last piece to the end of the turn.
    """
    import numpy as np
    import tokenizers
    from safetensors.numpy import load_file, save_file

    write_model(directory, "qwen3")
    write_tokenizer(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(one, normalized=False) for one in pieces])
    backend.save(str(directory / "tokenizer.json"))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    weights = load_file(directory / "model.safetensors")
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = np.zeros_like(value)
    weights["model.norm.weight"] = np.ones_like(weights["model.norm.weight"])
    embedding = weights["model.embed_tokens.weight"]
    output = np.zeros_like(embedding)
    chain = ["\u010a", *pieces, "<|im_end|>"]  # the first: a newline, as byte-level BPE writes it
    ids = [backend.token_to_id(one) for one in chain]
    for last, following in zip(ids, ids[1:], strict=False):
        output[following] = 10 * embedding[last] / np.linalg.norm(embedding[last])
    weights["lm_head.weight"] = output
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
