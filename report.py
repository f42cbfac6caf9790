"""The report of a run: report.md and its plots, made from result files alone (results*.jsonl, metrics.jsonl, config.json, generations).

    python report.py --out_dir=out/toy            # refuses to overwrite a report; --force replaces it, --no_overwrite keeps it
"""
import os
import re
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import configurator
import data
from configurator import UserError
from eval import STAGES, read_results
from problems import RERANKERS


@dataclass
class ReportConfig:
    out_dir: str = "out/toy"  # folder of a pipeline
    force: bool = False  # replace an existing report
    no_overwrite: bool = False  # keep an existing report and say so
    n_samples: int = 4  # test problems shown with every stage's answer


# Columns of the first table: heading, task, metric, protocol
COLUMNS = [("val loss (nats/token)", "val_loss", "val_loss", "windows"), ("problems, exact match", "problems", "exact_match", "greedy"),
           ("stops by itself", "problems", "stop_rate", "greedy"), ("prefers chosen, log-prob", "preference", "accuracy", "logprob"),
           ("prefers chosen, reward", "preference", "accuracy", "reward"), ("prefers chosen, length", "preference", "accuracy", "length"),
           ("tales on topic and kind", "tales", "on_topic_and_kind", "sampled"),
           ("response loss (nats/token)", "chats", "response_loss", "teacher"), ("answers stop", "chats", "stop_rate", "greedy"),
           ("repeated 4-grams", "chats", "repetition", "greedy")]


DIGITS = {"val_loss": 4, "response_loss": 4, "bits_per_byte": 4, "perplexity": 2, "auc": 3, "brier": 3, "calibration_error": 3,
          "loss_within_context": 3, "loss_beyond_context": 3}  # the rest are rates


def number(row: dict | None) -> str:
    """value [low, high] of a result; a rate as percent."""
    if row is None:
        return ""
    digits = DIGITS.get(row["metric"])
    show = lambda x: f"{100 * x:.1f}" if digits is None else f"{x:.{digits}f}"
    interval = f" [{show(row['low'])}, {show(row['high'])}]" if "low" in row else ""
    return show(row["value"]) + (" %" if digits is None else "") + interval


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def find(results: list[dict], **wanted) -> dict | None:
    """The newest result with these fields."""
    return next((row for row in reversed(results) if all(row.get(k) == v for k, v in wanted.items())), None)


def stage_table(results: list[dict]) -> str:
    models = list(dict.fromkeys(row["model"] for row in results))
    columns = [column for column in COLUMNS if any((row["task"], row["metric"], row["protocol"]) == column[1:] for row in results)]
    rows = [[model, *(number(find(results, model=model, task=t, metric=m, protocol=p)) for _, t, m, p in columns)] for model in models]
    counts = [max((row["n"] for row in results if (row["task"], row["metric"], row["protocol"]) == column[1:]), default=0) for column in columns]
    return table(["", *(column[0] for column in columns)], [row for row in rows if any(row[1:])] + [["n", *map(str, counts)]])


def rerank_table(results: list[dict]) -> str:
    ks = sorted({int(row["protocol"].partition("@")[2]) for row in results if row["task"] == "rerank" and "@" in row["protocol"]})
    rows = [[f"{how}, samples = {k}", number(find(results, task="rerank", protocol=f"{how}@{k}"))] for k in ks[-1:] for how in RERANKERS]
    stage = find(results, task="rerank")["model"]
    for how, name in (("likelihood", "the likelihood"), ("best_of", "the verifier"), ("best_of_same_form", "the verifier among solutions that stop and have an answer"),
                      ("form_alone", "form alone"), ("last_number_alone", "the verifier shown the final answer alone")):
        auc = find(results, task="rerank", metric="auc", protocol=how)
        if auc:
            rows.append([f"AUC of {name}, n = {auc['n']} solutions", number(auc)])
    for metric, name in (("brier", "Brier score of the verifier"), ("calibration_error", "expected calibration error")):
        row = find(results, task="rerank", metric=metric)
        rows += [[name, number(row)]] if row else []
    greedy = find(results, task="problems", model=stage, metric="exact_match")
    return table(["way to answer", "exact match"], [[f"greedy ({stage})", number(greedy)], *rows])


def plot_loss(folder: str, stage: str) -> str | None:
    rows = data.read_metrics(os.path.join(folder, stage, "metrics.jsonl"))
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, label="training")
    axes.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", ms=3, label="validation")
    if max(r["loss"] for r in train) > 10 * min(r["loss"] for r in train) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=f"{stage}: loss")
    return finish(figure, folder, f"loss_{stage}.png")


def plot_rerank(folder: str, results: list[dict]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for how, color in zip(RERANKERS, ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:gray")):
        rows = [find(results, task="rerank", protocol=p) for p in dict.fromkeys(r["protocol"] for r in results) if p.startswith(how + "@")]
        rows.sort(key=lambda r: int(r["protocol"].partition("@")[2]))
        k = [int(r["protocol"].partition("@")[2]) for r in rows]
        axes.plot(k, [100 * r["value"] for r in rows], "o-", ms=4, color=color, label=how.replace("_", " "))
        axes.fill_between(k, [100 * r["low"] for r in rows], [100 * r["high"] for r in rows], color=color, alpha=0.12, lw=0)
    greedy = find(results, task="problems", model=rows[0]["model"], metric="exact_match")
    if greedy:
        axes.axhline(100 * greedy["value"], color="black", ls="--", lw=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, map(str, k))
    axes.set(xlabel="samples per problem", ylabel="exact match, %", title="Choosing among samples (95 % intervals)")
    return finish(figure, folder, "best_of_n.png")


def plot_dpo(folder: str) -> str | None:
    """The four curves by which a DPO run is judged: log-probs and rewards, of chosen and rejected answers, held out."""
    rows = [r for r in data.read_metrics(os.path.join(folder, "dpo", "metrics.jsonl")) if "val_logps/chosen" in r]
    if not rows:
        return None
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5))
    for axes, kind, title in zip(both, ("logps", "rewards"), ("log-prob of the answers", "reward: beta x log-ratio to the reference")):
        for which, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            axes.plot([r["step"] for r in rows], [r[f"val_{kind}/{which}"] for r in rows], "o-", ms=3, color=color, label=which)
        axes.set(xlabel="step", title=title)
    return finish(figure, folder, "dpo_curves.png")


def plot_calibration(folder: str, results: list[dict]) -> str | None:
    """Share of right solutions beside the verifier's mean probability, by tenths of it."""
    newest = {r["protocol"]: r for r in results if r["task"] == "rerank" and r["metric"] == "calibration"}
    if not newest:
        return None
    rows = sorted(newest.values(), key=lambda r: r["predicted"])
    figure, axes = plt.subplots(figsize=(4.5, 3.8))
    p, share = [r["predicted"] for r in rows], [r["value"] for r in rows]
    axes.errorbar(p, share, [[max(0, r["value"] - r["low"]) for r in rows], [max(0, r["high"] - r["value"]) for r in rows]], fmt="o-", ms=4, capsize=2, label="verifier")
    axes.plot([0, 1], [0, 1], "k--", lw=1, label="calibrated")
    axes.set(xlabel="probability given by the verifier", ylabel="share of right solutions", title="Calibration (95 % intervals)")
    return finish(figure, folder, "calibration.png")


def streaming_table(results: list[dict]) -> str:
    rows = [r for r in results if r["task"] == "streaming" and r["metric"] in ("loss_within_context", "loss_beyond_context")]
    protocols, keys = (list(dict.fromkeys(values)) for values in ((r["protocol"] for r in rows), ((r["model"], r["metric"]) for r in rows)))
    return table(["model", "nats/token", *protocols], [
        [model, metric.replace("_", " "), *(number(find(rows, model=model, metric=metric, protocol=p)) for p in protocols)] for model, metric in keys])


def curves(results: list[dict], metric: str) -> dict[tuple[str, str], list[dict]]:
    """Newest rows of a metric by (model, way to read the stream), in the order of positions."""
    newest, lines = {(r["model"], r["protocol"]): r for r in results if r["task"] == "streaming" and r["metric"] == metric}, {}
    for (model, protocol), row in newest.items():
        lines.setdefault((model, protocol.split()[0]), []).append(row)
    return {key: sorted(rows, key=lambda r: r["position"]) for key, rows in lines.items()}


def plot_streaming(folder: str, results: list[dict]) -> str:
    """Loss against position by model and way to read, time per token, cache, and what every head gives to the sink and to the first token."""
    figure, axes = plt.subplot_mosaic([["loss"] * 4, ["ms", "cache", "share", "share"]], figsize=(12, 8.5))
    models = dict.fromkeys(r["model"] for r in results if r["task"] == "streaming")
    colors = {model: f"C{number}" for number, model in enumerate(models)}
    styles = {"rolling": {"ls": "-"}, "dense": {"ls": ":"}, "recompute": {"ls": "", "marker": "x", "ms": 5}}
    for panel, metric, unit in (("loss", "loss_at_position", 1), ("ms", "ms_per_token", 1), ("cache", "cache_bytes", 1e3)):
        for (model, how), rows in curves(results, metric).items():
            middle = [(r["position"] + r["width"] / 2) / r["seq_len"] for r in rows]
            axes[panel].plot(middle, [r["value"] / unit for r in rows], color=colors[model], lw=1.8, **styles[how],
                             label=f"{model}, {how}" if panel == "loss" else None)
            if panel == "loss" and how == "recompute":
                axes[panel].vlines(middle, [r["low"] for r in rows], [r["high"] for r in rows], color=colors[model], lw=0.8)
            elif panel == "loss":
                axes[panel].fill_between(middle, [r["low"] for r in rows], [r["high"] for r in rows], color=colors[model], alpha=0.1, lw=0)
        axes[panel].axvline(1, color="black", lw=0.8)
        axes[panel].set_xlabel("position / training context")
    gaps = [(model, find(results, model=model, metric="loss_beyond_context", protocol="rolling - recompute")) for model in colors]
    axes["loss"].set(ylabel="nats/token", title="Loss against position (95 % intervals over streams)\nrolling - recompute beyond the training context: "
                     + "; ".join(f"{model} {row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]" for model, row in gaps))
    axes["ms"].set(title="Time per token, ms", ylim=(0, None))
    axes["cache"].set(title="Keys and values kept, kB", ylim=(0, None))
    for model, metric, marker in ((model, *kind) for model in colors for kind in (("sink_share", "o"), ("first_token_share", "^"))):
        newest = {r["protocol"]: r for r in results if r["task"] == "streaming" and (r["model"], r["metric"]) == (model, metric)}
        if newest:
            heads, shares = [f"{r['layer']}.{r['head']}" for r in newest.values()], [100 * r["value"] for r in newest.values()]
            label = f"{model}: {metric.removesuffix('_share').replace('_', ' ')}"
            axes["share"].plot(heads, shares, color=colors[model], ms=6, ls="", marker=marker, label=label)
            uniform = 100 * next(iter(newest.values()))["uniform"]
    axes["share"].axhline(uniform, color="black", ls="--", lw=1, label="all looked at alike")
    axes["share"].set(title="Attention given by the second half of the training context, %", xlabel="layer.head", ylim=(0, None))
    axes["share"].tick_params("x", rotation=90)
    for panel in axes.values():
        panel.title.set_fontsize(10)
    return finish(figure, folder, "streaming.png")


def plot_attention(folder: str, results: list[dict], stage: str, sentence: int) -> str:
    """Every layer (down) and head (across) on one sentence: who (rows) looks at whom (columns; the sink last)."""
    (kept,) = data.read_jsonl(os.path.join(folder, "attention", f"{stage}_{sentence}.jsonl"))
    tokens = [repr(token)[1:-1].replace(" ", "\N{OPEN BOX}") for token in kept["tokens"]]
    columns, side = tokens + ["SINK"] * kept["sinks"], max(2.2, 0.4 + 0.085 * len(tokens))  # inches of a map
    n_layer, n_head = len(kept["maps"]), len(kept["maps"][0])
    figure, grid = plt.subplots(n_layer, n_head, sharex=True, sharey=True, squeeze=False, layout="constrained",
                                figsize=(side * n_head + 1, (side + 0.4) * n_layer + 0.6))
    for layer, head in ((layer, head) for layer in range(n_layer) for head in range(n_head)):
        axes, of_head = grid[layer, head], dict(task="attention", model=stage, protocol=f"sentence {sentence} layer {layer + 1} head {head + 1}")
        weights = [row[:len(columns)] for row in kept["maps"][layer][head]]
        image = axes.imshow(weights, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, 0, 1), aspect="auto")
        shares = {name: find(results, metric=f"{name}_share", **of_head) for name in ("sink", "first_token")}
        entropy = find(results, metric="attention_entropy", **of_head)
        axes.set_title(f"layer {layer + 1} head {head + 1}: entropy {entropy['value']:.2f}\n"
                       + ", ".join(f"{name.replace('_', ' ')} {100 * row['value']:.1f} %" for name, row in shares.items() if row), fontsize=max(8, 2.4 * side))
        axes.set_xticks(range(len(columns)), columns, fontsize=6, rotation=90)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
    figure.suptitle(f"{stage}: attention of each token (row) to those before it (columns); {len(tokens)} tokens. Entropy in nats: {entropy['uniform']:.2f} "
                    "where all are looked at alike", fontsize=max(10, 3 * side))
    figure.colorbar(image, ax=grid, shrink=0.5, aspect=40, label="weight")
    return save(figure, folder, f"attention_{stage}_{sentence}.png")


def finish(figure, folder: str, name: str) -> str:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    return save(figure, folder, name)


def save(figure, folder: str, name: str) -> str:
    data.write_atomic(os.path.join(folder, name), lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)
    return name


def runs(folder: str) -> list[str]:
    """Those below a folder, stages first."""
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, "metrics.jsonl")))
    return sorted(names, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))


def cost_table(folder: str) -> str:
    rows, seconds = [], 0.0
    for stage in runs(folder):
        steps = [r for r in data.read_metrics(os.path.join(folder, stage, "metrics.jsonl")) if "tokens" in r]
        if steps:
            last = steps[-1]
            took = last["step_ms"] * (last["step"] + 1) / 1e3
            seconds += took
            rows.append([stage, f"{last['step'] + 1}", f"{last['tokens'] / 1e6:.2f}M", f"{last['flops']:.2e}", f"{last['tokens_per_s']:,.0f}", f"{took:.0f}"])
    return table(["stage", "steps", "tokens", "FLOPs", "tokens/s", "training s"], [*rows, ["all", "", "", "", "", f"{seconds:.0f}"]])


def samples(folder: str, n: int) -> str:
    """The same test problems answered greedily by every stage, from the stored generations."""
    path = os.path.join(folder, "generations")
    parts, answers = [], {}
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        rows = data.read_jsonl(os.path.join(path, name))
        if len(rows[0]["solutions"]) == 1:
            answers[name.split("_")[0]] = rows
    order = [stage for stage in ("untrained", *STAGES) if stage in answers]
    for i in range(min(n, len(answers[order[0]])) if order else 0):
        row = answers[order[0]][i]
        said = [f"- **{stage}**: `{show(answers[stage][i]['solutions'][0]['text'])}`" for stage in order]
        parts.append("\n".join([f"**{row['question']}** (right: `{show(row['answer'])}`)", *said]))
    return "\n\n".join(parts)


def show(text: str, width: int = 100) -> str:
    text = re.sub(r"[^ -~]+", " ", text.replace("\n", "; ").replace("`", "'"))
    return text[:width] + " ..." * (len(text) > width)


def write_report(folder: str, n_samples: int) -> str:
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    last = results[-1]
    parts = [f"# Report of {folder}", f"Commit {last['commit']}{' (with uncommitted changes)' if last['dirty'] else ''}, torch {last['torch']}, "
             f"{last['device']}, {last['date']}. Every number comes from results*.jsonl and metrics.jsonl in this folder; brackets are 95 % intervals.",
             "## What each stage brought", stage_table(results)]
    if find(results, task="rerank"):
        parts += ["## The verifier", rerank_table(results), "majority: the most common answer; likelihood: the solution that the model itself "
                  "finds likeliest; weighted: votes weighted by the verifier; best_of: the verifier's first choice; oracle: solved when any "
                  "sample is right, which no choice among them can beat.", f"![]({plot_rerank(folder, results)})", *(f"![]({name})" for name in [plot_calibration(folder, results)] if name)]
    judged = {(row["metric"], row["protocol"]): row for row in results if row["task"] == "published"}
    if judged:
        parts += ["## Published solutions of GSM8K's test problems, judged", table(["", "", "n"], [
            [f"{r['metric'].replace('_', ' ')}, {p}", number(r), str(r["n"])]
            for (_, p), r in judged.items() if r["metric"] in ("auc", "exact_match")])]
    texts = [row for row in results if row["task"] == "text_perplexity"]
    if texts:
        keys = list(dict.fromkeys((r["model"], r["split"]) for r in texts))
        protocols = list(dict.fromkeys(r["protocol"] for r in texts))
        parts += ["## Perplexity by protocol", table(["model", "text", *protocols], [[m, s, *(number(find(texts, model=m, split=s, protocol=p)) for p in protocols)] for m, s in keys])]
    if find(results, task="streaming"):
        parts += ["## Streams of 16 training contexts", streaming_table(results), "rolling: a cache of one training context, token by token; dense: every "
                  "token sees all before it; recompute: the last training context from scratch for every token. As good as recompute means stable, "
                  "not a longer memory: no key is older than the cache.", f"![]({plot_streaming(folder, results)})"]
    looked_at = sorted({(row["model"], int(row["protocol"].split()[1])) for row in results if row["task"] == "attention"})
    if looked_at:
        parts += ["## Attention maps", *(f"![]({plot_attention(folder, results, *which)})" for which in looked_at)]
    parts += ["## Loss of each stage", *(f"![]({name})" for name in [*(plot_loss(folder, stage) for stage in runs(folder)), plot_dpo(folder)] if name)]
    shown = samples(folder, n_samples)
    parts += ["## The same problems at every stage", shown] if shown else []
    hashes = {row["stage"]: row["weights_hash"] for row in results} | {"verifier": row["verifier_hash"] for row in results if "verifier_hash" in row}
    parts += ["## Cost", cost_table(folder), "## Weights", table(["stage", "sha256 of the weights"], [[k, v] for k, v in hashes.items()])]
    path = os.path.join(folder, "report.md")
    data.write_atomic(path, lambda f: f.write(("\n\n".join(parts) + "\n").encode()))
    return path


def main(argv: list[str]) -> int:
    cfg = configurator.load(ReportConfig, argv)
    path = os.path.join(cfg.out_dir, "report.md")
    if os.path.exists(path) and not cfg.force:
        if cfg.no_overwrite:
            print(f"report: {path} exists and is kept (--force replaces it)")
            return 0
        raise UserError(f"{path} exists: --force replaces it, --no_overwrite keeps it")
    print(f"report: {write_report(cfg.out_dir, cfg.n_samples)}")
    return 0


if __name__ == "__main__":
    configurator.run(main)
