"""Small tokenizers in the two ways that published ones work, written as a checkpoint has them."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}
{%- if tools %}tools: {{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def by_bytes() -> Tokenizer:
    """GPT-2's way: every byte a token, a few merges, a space belongs to the word behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ġw", "o")]
    words = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def by_pieces() -> Tokenizer:
    """Llama's way: words with their space in front as ▁, what is unknown byte by byte, <s> in front of all."""
    parts = [*"▁helowr", "he", "wo", "▁he", "▁wo"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts]
    merges = [("h", "e"), ("w", "o"), ("▁", "he"), ("▁", "wo")]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.normalizer = spaced
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    return tokenizer


def write(directory, tokenizer=None, **files):
    """The tokenizer in `directory`, with `files` beside it: dictionaries as name.json, text as name.jinja."""
    directory.mkdir(exist_ok=True)
    (by_bytes() if tokenizer is None else tokenizer).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "chat_template": TEMPLATE}
    for name, content in ({"tokenizer_config": settings} | files).items():
        suffix, text = ("jinja", content) if isinstance(content, str) else ("json", json.dumps(content))
        (directory / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return directory
