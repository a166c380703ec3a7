"""A model and rows that somebody has, from the command line alone: a Qwen folder made by transformers → sft → adapter →
merged folder → GGUF → generated text."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEMPLATE = (  # as Qwen's: a default system message, no generation markers
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ("red", "green", "blue", "gray")
ROWS = [
    {"conversations": [{"from": "human", "value": f"word {i}?"}, {"from": "gpt", "value": WORDS[i % 4]}]}
    for i in range(40)
]


def finetune(*words):
    """stdout of `python -m finetune …`, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def qwen(tmp_path):
    """A folder as Qwen2.5's: biased q, k, v, a tied head, its own pre-tokenizer, ChatML without generation markers."""
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    folder = tmp_path / "qwen"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=backend.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=2, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias.normal_()
    model.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.peer
def test_from_a_folder_to_a_gguf_by_the_command_line(qwen, tmp_path):
    import transformers

    run, merged, file = tmp_path / "run", tmp_path / "merged", tmp_path / "merged.gguf"
    shown = finetune(
        "run", "sft", "--model", qwen, "--data", tmp_path / "rows.jsonl", "--out", run, "--threads", 1, "--steps", 150,
        "--lr", 1e-2, "--batch", 4, "--rank", 8, "--max-length", 64, "--eval-rows", 2, "--samples", 1,
        "--eval-every", 0,
    )  # fmt: skip
    assert "sharegpt" in shown
    # what the run says to do next is what works
    said = [
        shlex.split(line)[3:] for line in map(str.strip, shown.splitlines()) if line.startswith("python -m finetune")
    ]
    assert {words[0] for words in said} >= {"generate", "merge"}
    finetune("merge", run, "--out", merged)
    finetune("export", merged, "--gguf", "f16", "--out", file)
    question = ("--prompt", "word 5?", "--max-new-tokens", 8)
    base, tuned = json.loads(finetune("generate", "--model", run, "--compare", "--json", *question))[0][
        "answers"
    ].values()
    answers = [finetune("generate", "--model", path, *question) for path in (merged, file)]
    assert tuned != base
    assert {answer.strip() for answer in answers} == {tuned.strip()}
    assert tuned.strip() in WORDS  # it has learned what answers look like
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word 5?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == tuned.strip()
