"""Models in and out, between transformers' folders or GGUF files and our run folders.

    python convert.py --from=FOLDER --out_dir=out/smollm2/base    # config.json, *.safetensors
    python convert.py --from=MODEL.gguf --out_dir=out/smollm2/base
    python convert.py --init_from=out/toy/dpo --dest=FOLDER       # AutoModelForCausalLM loads it

An imported run is like any other: align.py, eval.py, sample.py and train.py go on from it. Its
tokenizer and its chat template travel in its checkpoint.
"""

from dataclasses import dataclass

from configurator import UserError, as_dict, load, require
from exchange.exporting import export_model
from exchange.importing import import_model
from runtime.program import run

IMPORT = ("from_", "out_dir", "seq_len", "template")  # the keys of an import
EXPORT = ("init_from", "dest", "tokenizer", "data_dir")


@dataclass
class ConvertConfig:
    """What to convert."""

    from_: str | None = None  # import: a transformers folder or a GGUF file
    out_dir: str | None = None  # import: the new run folder
    seq_len: int | None = None  # import: the model's context; None = all it was made for
    template: str = "auto"  # import: of chats, the model's own (auto), or chat-1, ours
    init_from: str | None = None  # export: run folder, checkpoint file or run name
    dest: str | None = None  # export: the new folder
    tokenizer: str | None = None  # export: the path of a ranks file; None = as the checkpoint says
    data_dir: str = "data"  # export: where the ranks of gpt2 are

    def __post_init__(self):
        require(self, {"[1, inf)": "seq_len"}, {"template": ("auto", "chat-1")})


def main(argv: list[str]) -> int:
    cfg = load(argv, ConvertConfig)
    given = {key for key, value in as_dict(cfg).items() if value != getattr(ConvertConfig, key)}
    if {"from_", "out_dir"} <= given <= {*IMPORT}:
        import_model(cfg.from_, cfg.out_dir, cfg.seq_len, cfg.template)
    elif {"init_from", "dest"} <= given <= {*EXPORT}:
        export_model(cfg.init_from, cfg.dest, cfg.tokenizer, cfg.data_dir)
    else:
        flags = [[f"--{key.rstrip('_')}" for key in keys] for keys in (given, IMPORT, EXPORT)]
        found, ins, outs = (" ".join(part) for part in flags)
        raise UserError(f"{found or 'nothing'} given: an import takes {ins}, an export {outs}")
    return 0


if __name__ == "__main__":
    run(main)
