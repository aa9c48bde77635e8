"""A small GPT-2 that learns Python's own documentation, trained by Hugging Face's Trainer.

Runs as it is, and on spot machines without a change:
    python examples/adapters/trainer/train.py
    python -m flows train examples/adapters/trainer/job.yaml
"""

import argparse
import hashlib
import pydoc_data.topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from holdfast.adapters.transformers import HoldfastCallback

CONTEXT = 48


def windows(text: str) -> list[dict[str, torch.Tensor]]:
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    pieces = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--windows", type=int, default=1000, help="how much of the text is learnt")
    arguments = options.parse_args()
    torch.set_num_threads(1)

    topics = pydoc_data.topics.topics
    data = windows("\n".join(topics[name] for name in sorted(topics)))[: arguments.windows]
    tenth = len(data) // 10
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4)
    shape.bos_token_id = shape.eos_token_id = None  # bytes have none
    model = GPT2LMHeadModel(shape)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="trainer",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=5,
            eval_strategy="epoch",
            save_strategy="no",  # Holdfast keeps what must survive; Trainer's own folders are the machine's
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=data[tenth:],
        eval_dataset=data[:tenth],
    )
    trainer.add_callback(HoldfastCallback(trainer))
    trainer.train()

    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} after {trainer.state.global_step} steps")
    print(f"weights {digest.hexdigest()}")


if __name__ == "__main__":
    main()
