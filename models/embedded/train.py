"""Trains the embedded model.

    python -m halyard.models.embedded.train data  --work DIR      corpus, tokenizer, packed tokens
    python -m halyard.models.embedded.train train --work DIR --out MODEL_DIR --minutes 5

`data` needs a standard library to read and the tokenizers package; `train` needs torch and
transformers and is made for one GPU (it runs on a CPU too, for a few steps).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 2048  # tokens
VOCABULARY = 4096
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def make_data(work: Path) -> None:
    """Write tokenizer.json, train.npy and held_out.npy (uint16) to `work`."""
    import corpus  # type: ignore[import-not-found]  # beside this file, which runs as a script
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    work.mkdir(parents=True, exist_ok=True)
    files = list(corpus.documents())
    talks = list(corpus.dialogues())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [corpus.END_OF_TEXT, corpus.END, *corpus.ROLES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    training = [text for name, text in files if not corpus.is_held_out(name)]
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    parts: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    sizes = {"train": 0, "held_out": 0}

    def add(split: str, text: str) -> None:
        ids = tokenizer.encode(text).ids
        parts[split].append(np.array([*ids, end], dtype=np.uint16))
        sizes[split] += len(text.encode())

    for name, text in files:
        add("held_out" if corpus.is_held_out(name) else "train", text)
    held_out_documents = sum(map(len, parts["held_out"]))
    for name, text in talks:
        if not corpus.is_held_out(name):
            add("train", text)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(parts["train"]))
    np.save(work / "train.npy", np.concatenate([parts["train"][i] for i in order]))
    np.save(work / "held_out.npy", np.concatenate(parts["held_out"]))
    facts = {
        "files": len(files),
        "dialogues": len(talks),
        "train_bytes": sizes["train"],
        "held_out_bytes": sizes["held_out"],
        "train_tokens": int(sum(map(len, parts["train"]))),
        "held_out_tokens": int(held_out_documents),
    }
    (work / "facts.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts))


def train(
    work: Path,
    out: Path,
    minutes: float,
    device: str,
    batch: int,
    max_steps: int,
    dropout: float,
    decay: float,
) -> None:
    """Train for a given time and write the best checkpoint by held-out loss to `out`.

    The corpus is small, so regularisation matters: dropout on embeddings and attention, weight decay.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = torch.from_numpy(np.load(work / "train.npy").astype(np.int64)).to(device)
    held = torch.from_numpy(np.load(work / "held_out.npy").astype(np.int64)).to(device)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=[0, 1],
        pad_token_id=None,
        attention_dropout=dropout,
        **SHAPE,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embedded = model.get_input_embeddings()(rows[:, :-1])
            embedded = torch.nn.functional.dropout(embedded, dropout, model.training)
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten()
        )

    step_loss = torch.compile(loss_of) if device == "cuda" else loss_of

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        count = min((held.numel() - 1) // CONTEXT, 10**9 if device == "cuda" else 2)
        rows = held[: count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
        total = sum(float(loss_of(part)) * len(part) for part in rows.split(batch))
        model.train()
        return total / len(rows)

    best: tuple[float, dict[str, Any]] = (math.inf, {})
    if device == "cuda":  # compile before the clock starts
        step_loss(tokens[: batch * (CONTEXT + 1)].view(batch, -1)).backward()
        optimiser.zero_grad(set_to_none=True)
    started = time.time()
    budget = minutes * 60
    span = torch.arange(CONTEXT + 1, device=device)
    step = 0
    next_check = 0.15
    while True:
        progress = (time.time() - started) / budget
        if max_steps:
            progress = max(progress, step / max_steps)
        if progress >= 1:
            break
        warmup = min(1.0, (step + 1) / 100)
        rate = 3e-3 * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, tokens.numel() - CONTEXT - 1, (batch, 1), device=device)
        loss = step_loss(tokens[starts + span])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            print(
                f"step {step} loss {loss.item():.3f} at {time.time() - started:.0f} s", flush=True
            )
        if progress >= next_check:
            next_check += 0.12
            best = min(best, (held_out_loss(), _copy(model)), key=lambda pair: pair[0])
            print(f"held-out loss {best[0]:.4f} (best) at step {step}", flush=True)
    best = min(best, (held_out_loss(), _copy(model)), key=lambda pair: pair[0])
    facts = {
        "steps": step,
        "tokens": step * batch * CONTEXT,
        "seconds": round(time.time() - started),
        "held_out_loss": round(best[0], 4),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    print(json.dumps(facts), flush=True)
    model.config.attention_dropout = 0.0
    model.load_state_dict(best[1])
    export(model, work, out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def _copy(model: Any) -> dict[str, Any]:
    state = model.state_dict()
    return {key: value.detach().clone() for key, value in state.items()}


def export(model: Any, work: Path, out: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16 with its tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).cpu().save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 1], "do_sample": True, "temperature": 0.7}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "train"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, default=Path(".train"))
        if name == "train":
            command.add_argument("--out", type=Path, required=True)
            command.add_argument("--minutes", type=float, default=5.0)
            command.add_argument("--device", default="cuda")
            command.add_argument("--batch", type=int, default=64)
            command.add_argument("--dropout", type=float, default=0.1)
            command.add_argument("--decay", type=float, default=0.1)
            command.add_argument("--max-steps", type=int, default=0, help="0: until the time is up")
    args = parser.parse_args()
    if args.command == "data":
        make_data(args.work)
    else:
        train(
            args.work,
            args.out,
            args.minutes,
            args.device,
            args.batch,
            args.max_steps,
            args.dropout,
            args.decay,
        )


if __name__ == "__main__":
    main()
