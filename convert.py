"""Models in and out, between transformers' folders or GGUF files and our run folders.

    python convert.py --from=FOLDER --out_dir=out/smollm2/base    # config.json, *.safetensors
    python convert.py --from=MODEL.gguf --out_dir=out/smollm2/base
    python convert.py --init_from=out/toy/dpo --dest=FOLDER       # AutoModelForCausalLM loads it

An imported run is like any other: align.py, eval.py, sample.py and train.py go on from it. Its
tokenizer and its chat template travel in its checkpoint.
"""

from dataclasses import dataclass

from configurator import UserError, load, require
from exchange.importing import import_model
from runtime.program import run


@dataclass
class ConvertConfig:
    """What to convert."""

    from_: str | None = None  # transformers folder or GGUF file to import
    out_dir: str | None = None  # the new run folder
    seq_len: int | None = None  # of the imported model: its context; None = all it was made for
    template: str = "auto"  # of chats: the model's own (auto), or chat-1, ours

    def __post_init__(self):
        require(self, {"[1, inf)": "seq_len"}, {"template": ("auto", "chat-1")})


def main(argv: list[str]) -> int:
    cfg = load(argv, ConvertConfig)
    if not cfg.from_ or not cfg.out_dir:
        raise UserError("nothing to do: give --from=FOLDER --out_dir=RUN")
    import_model(cfg.from_, cfg.out_dir, cfg.seq_len, cfg.template)
    return 0


if __name__ == "__main__":
    run(main)
