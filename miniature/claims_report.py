"""claims.md, claims.json, times.json and the plots of `python -m miniature claims`."""
import datetime
import math
import os
import platform
import sys
from collections import defaultdict
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import diffusers
import matplotlib.pyplot as plt
import torch
import transformers

from cobsat_eval import DETAILS, KINDS
from common import read_json, write_atomically, write_json
from miniature import muon
from miniature.claims import (
    CONDITIONS,
    DRAWN_LEVELS,
    RECIPES,
    SIZES,
    STATISTICS,
    WORDS_TOO,
    all_jobs,
    finished_file,
    hard_levels,
    training_runs,
    within_kind,
)

# Okabe and Ito's colors, which the color-blind tell apart
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
Z = 1.959964


class Share(NamedTuple):
    """`right` of n, with Wilson's 95 % interval."""
    right: int
    n: int

    def interval(self):
        """(lower, upper), 0..1."""
        p, square = self.right / self.n, Z**2 / self.n
        half = Z * math.sqrt(p * (1 - p) / self.n + square / (4 * self.n))
        return tuple((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))

    def __str__(self):
        low, high = self.interval()
        return f"{100 * self.right / self.n:.1f} ({100 * low:.1f} to {100 * high:.1f})"


class Spread(NamedTuple):
    """A figure of each aligner seed; shown as mean and range."""
    values: tuple
    scale: float = 100
    digits: int = 1

    def __str__(self):
        shown = [self.scale * value for value in self.values]
        mean, low, high = sum(shown) / len(shown), min(shown), max(shown)
        if len(shown) == 1:
            return f"{mean:.{self.digits}f}"
        return f"{mean:.{self.digits}f} [{low:.{self.digits}f}, {high:.{self.digits}f}]"


class Difference(NamedTuple):
    """Mean of paired differences, with a normal 95 % interval."""
    values: tuple
    scale: float = 100
    digits: int = 1

    def interval(self):
        """(mean, half the width of the interval)."""
        d = torch.tensor(self.values, dtype=torch.float64)
        half = Z * d.std().item() / math.sqrt(len(d)) if len(d) > 1 else 0.0
        return d.mean().item(), half

    def __str__(self):
        mean, half = (self.scale * value for value in self.interval())
        return f"{mean:+.{self.digits}f} ± {half:.{self.digits}f}"


def share(right):
    """The Share of true values in a list."""
    return Share(sum(right), len(right))


def rate(right):
    """The share of true values in a list, a float."""
    return sum(right) / max(1, len(right))


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, ties at their mean rank; 0 if all are equal."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    ranks = [(v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2 for v in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()


def number_of(cell):
    """A table's cell as claims.json holds it."""
    if isinstance(cell, Share):
        return {**cell._asdict(), "interval": cell.interval()}
    if isinstance(cell, Spread):
        return {"seeds": cell.values, "mean": sum(cell.values) / len(cell.values)}
    if isinstance(cell, Difference):
        return dict(zip(("mean", "half_width"), cell.interval(), strict=True))
    return cell


class Report:
    """The results of all jobs, and the page and the numbers made of them."""

    def __init__(self, place):
        self.place, self.lines, self.tables, self.section = place, [], {}, ""
        self.results = {job.name: read_json(finished_file(place.out, job.name))
                        for stage in all_jobs() for job in stage}

    def seeds(self, name):
        """The results of a training for each seed."""
        return [self.results[f"{name}-seed{seed}"] for seed in range(SIZES["seeds"])]

    def drawn(self, answers, method):
        """The results of drawing a set by a method, for each seed (words and oracle have one)."""
        if answers == "main" and method in RECIPES["lvlm"]:
            return self.seeds(method)
        names = [f"draw {answers}, {method}, seed {seed}" for seed in range(SIZES["seeds"])]
        return [self.results[name] for name in names if name in self.results]

    def head(self, title, text):
        """Begins a section with a paragraph."""
        self.section = title
        self.lines += [f"\n## {title}\n", text]

    def table(self, columns, rows, about=""):
        """Adds a table; cells: text, numbers, Share, Spread or Difference."""
        def text(cell):
            return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

        self.lines += [f"\n{about}\n" if about else "", "| " + " | ".join(columns) + " |",
                       "|" + "---|" * len(columns)]
        self.lines += ["| " + " | ".join(map(text, row)) + " |" for row in rows]
        self.tables[f"{self.section}{': ' * bool(about)}{about}"] = [
            dict(zip(columns, map(number_of, row), strict=True)) for row in rows]

    def plot(self, name, axes_titles, draw, size=(6, 4)):
        """Adds OUT/NAME.png: draw(axes) fills one panel for each (title, x label, y label)."""
        figure, axes = plt.subplots(1, len(axes_titles), figsize=size, squeeze=False)
        for axis, (title, x, y) in zip(axes[0], axes_titles, strict=True):
            axis.set(title=title, xlabel=x, ylabel=y)
            axis.spines[["top", "right"]].set_visible(False)
        draw(*axes[0])
        figure.tight_layout()
        write_atomically(self.place.out / f"{name}.png",
                         lambda temporary: figure.savefig(temporary, format="png", dpi=150))
        plt.close(figure)
        self.lines.append(f"\n![{name}]({name}.png)")

    def accuracy_row(self, label, name, key="right"):
        """A variant's accuracy: with intervals for each seed, then mean and range."""
        lists = [result[key] for result in self.seeds(name)]
        return [label, *map(share, lists), Spread(tuple(map(rate, lists)))]


def seed_columns():
    """Heads of accuracy_row."""
    return [*[f"seed {seed}, %" for seed in range(SIZES["seeds"])], "mean [range], %"]


def of_questions(right, **wanted):
    """The part of a list over the main questions with these shots, this detail, or by_value."""
    details = list(DETAILS)
    facts = [{"detail": details[i % 5], "shots": 2 + 2 * (i // 5 % 2), "by_value": i // 10 % 2 == 0}
             for i in range(len(right))]
    return [one for one, fact in zip(right, facts, strict=True) if wanted.items() <= fact.items()]


def spread_of(lists, **wanted):
    """Spread of the rates of lists, one a seed, over a part of the main questions."""
    return Spread(tuple(rate(of_questions(one, **wanted)) for one in lists))


# ---------------------------------------------------------------- the sections
def norms(r):
    r.head("1. The norm (Fig. 7)", "Aligners whose RMSNorm starts from T5's weight (t5), from ones "
           "(default), or that have none. The loss is the cross-entropy of a target token.")
    names = {"t5": "paper", "default": "norm-default", "none": "norm-none"}
    rows = []
    for prefix, key, what in (("", "right", "LVLM"), ("clip-", "right", "CLIP, redrawn"),
                              ("clip-", "composed", "CLIP, image + text")):
        for norm, name in names.items():
            last = tuple(result["curve"][-1][2] for result in r.seeds(prefix + name))
            _, *cells = r.accuracy_row(norm, prefix + name, key)
            rows.append([what, norm, Spread(last, 1, 3), *cells])
    r.table(["variant", "norm", "held-out loss at the end", *seed_columns()], rows)

    def draw(*axes):
        for axis, prefix in zip(axes, ("", "clip-"), strict=True):
            for color, (norm, name) in zip(COLORS, names.items(), strict=False):
                for seed, result in enumerate(r.seeds(prefix + name)):
                    steps, train, held_out = zip(*result["curve"], strict=True)
                    axis.plot(steps, train, color=color, lw=0.5, alpha=0.35)
                    points = [(s, h) for s, h in zip(steps, held_out, strict=True) if h is not None]
                    axis.plot(*zip(*points, strict=True), color=color, lw=1.5,
                              label=f"norm {norm}" if not seed else None)
            axis.set_yscale("log")
            for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                part("{x:g}")
            axis.legend(frameon=False)

    r.plot("norms", [(f"ThinkDiff-{name}: held-out (thick), training (thin)", "step",
                      "cross-entropy per token") for name in ("LVLM", "CLIP")], draw, (12, 4.5))


def masking(r):
    r.head("2. Masking and input tokens (Table 3)", "With random masking (a prefix is read, the "
           "rest is written), without (all is read, all is written), and with the features of the "
           "prompt's tokens.")
    names = {"random masking": "paper", "no masking": "masking-none", "input tokens": "input"}
    r.table(["2 and 4 shots", *seed_columns()],
            [r.accuracy_row(label, name) for label, name in names.items()])
    rows = []
    for label, name in names.items():
        lists = [result["right"] for result in r.seeds(name)]
        rows.append([label, spread_of(lists, shots=2),
                     *(spread_of(lists, shots=2, detail=detail) for detail in DETAILS)])
    r.table(["2 shots", "all, %", *DETAILS], rows, "By detail: mean [range over seeds], %.")


def shots(r):
    r.head("3. Shots and tasks (Tables 1 and 2)", f"{SIZES['questions']} in-context questions. "
           "Words: the VLM's answer through T5's encoder. Oracle: the true answer in words.")
    methods = ["words", *RECIPES["lvlm"], WORDS_TOO, "oracle"]
    cases = [{}, {"shots": 2}, {"shots": 4}, {"by_value": True}, {"by_value": False}]
    cases += [{"detail": detail} for detail in DETAILS]
    named = r.results["main"]["named"]
    rows = [["the VLM names it", *(spread_of([named], **case) for case in cases)]]
    for method in methods:
        lists = [result["right"] for result in r.drawn("main", method)]
        rows.append([method, *(spread_of(lists, **case) for case in cases)])
    r.table(["mean [range], %", "all", "2 shots", "4 shots", "value asked", "noun asked", *DETAILS],
            rows)
    r.table(["method", *seed_columns()],
            [[method, *([share(d["right"]) for d in r.drawn("main", method)]
                        + ["-"] * SIZES["seeds"])[:SIZES["seeds"]],
              Spread(tuple(rate(d["right"]) for d in r.drawn("main", method)))]
             for method in methods], "The same with intervals.")

    rows, n = [], SIZES["hard"]
    for name, _, _ in hard_levels():
        lists = {"the VLM names it": [r.results[name]["named"]]}
        for method in ("words", *RECIPES["lvlm"]) if name in DRAWN_LEVELS else ():
            lists[method] = [result["right"] for result in r.drawn(name, method)]
        for method, of_seeds in lists.items():
            gains = tuple(sum(one[n + i] - one[i] for one in of_seeds) / len(of_seeds)
                          for i in range(n))
            rows.append([name, method, *(Spread(tuple(rate(one[part]) for one in of_seeds))
                                         for part in (slice(n), slice(n, None))),
                         Difference(gains)])
    r.table(["examples", "method", "2 shots, %", "4 shots, %", "gain of 4 over 2"], rows,
            f"Harder: {n} questions whose example images have noise of this standard deviation, or "
            "are blended with this share of an image of another kind. The gain is paired by "
            "question, with its 95 % interval, in percentage points.")


def steps(r):
    r.head("4. Steps and samples (Table 4)", f"Accuracy of the checkpoints of runs of "
           f"{SIZES['long']} steps, and of {SIZES['lvlm']} steps on fewer images.")
    rows = []
    points = {}
    for recipe in ("paper-long", "encoder-1-long"):
        of_seeds = r.seeds(recipe)
        lists = {step: [result["checkpoints"][str(step)] for result in of_seeds]
                 for step in SIZES["checkpoints"]}
        lists[SIZES["long"]] = [result["right"] for result in of_seeds]
        points[recipe] = {step: [rate(one) for one in of_step] for step, of_step in lists.items()}
        rows.append([recipe, *(spread_of(of_step) for of_step in lists.values())])
    r.table(["mean [range], %", *(f"step {step}" for step in points["paper-long"])], rows)
    names = {n: f"samples-{n}" for n in SIZES["samples"]} | {SIZES["images"]: "paper"}
    r.table(["images", *seed_columns()],
            [r.accuracy_row(n, name) for n, name in names.items()], "Fewer images.")

    def draw(axis):
        for color, marker, (recipe, of_steps) in zip(COLORS, MARKERS, points.items(), strict=False):
            means = [100 * sum(values) / len(values) for values in of_steps.values()]
            axis.plot([*of_steps], means, color=color, marker=marker, label=recipe)
            axis.fill_between([*of_steps], *([100 * end(values) for values in of_steps.values()]
                                          for end in (min, max)), color=color, alpha=0.15, lw=0)
        axis.set_xscale("log")
        axis.set_xticks([*points["paper-long"]], [*map(str, points["paper-long"])])
        axis.minorticks_off()
        axis.legend(frameon=False, loc="lower right")

    r.plot("steps", [("mean and range of the aligner seeds", "training steps", "right, %")], draw)


def ablations(r):
    r.head("5. Splits, tokens, width and depth", "The paper's recipe with one change each. "
           "Scattered: any tokens are read, the others written. Sentences: the prefix ends with a "
           "sentence. Deeper: one more linear layer of the same width.")
    names = {"paper: prefix, 40 tokens, width 512": "paper", "scattered": "scattered",
             "sentences": "sentences", **{f"{n} tokens": f"tokens-{n}" for n in SIZES["tokens"]},
             **{f"width {n}": f"hidden-{n}" for n in (32, 256)}, "deeper": "deeper"}
    r.table(["change", *seed_columns()],
            [r.accuracy_row(label, name) for label, name in names.items()])


def encoder_weights(r):
    r.head("6. The encoder term", "Its weight lambda, for both variants; 0 is the paper's loss.")
    names = {"0": "paper", "1": "encoder-1", "2": "encoder-2",
             f"0, {SIZES['long']} steps": "paper-long",
             f"1, {SIZES['long']} steps": "encoder-1-long"}
    r.table(["LVLM, lambda", *seed_columns()],
            [r.accuracy_row(label, name) for label, name in names.items()], "LVLM.")
    style = [i for i, kind in enumerate(r.results["pictures"]["kinds"]) if kind[0] == "style"]
    for key, what in (("right", "an image redrawn"), ("composed", "an image + a text")):
        rows = []
        for label, name in zip((0, 2), RECIPES["clip"], strict=True):
            styles = tuple(rate([result[key][i] for i in style]) for result in r.seeds(name))
            rows.append([*r.accuracy_row(label, name, key), Spread(styles)])
        r.table(["CLIP, lambda", *seed_columns(), "style"], rows, f"CLIP, {what}.")


def transfers(r):
    r.head("7. What transfers", "Every aligner above: cosine of x' to T5's encoder outputs for the "
           "same text (LVLM: matched token by token; CLIP: each caption token's nearest x'), their "
           "squared distance relative to the outputs', and the share read right by a small reader "
           "that was trained on encoder outputs of captions and reads "
           f"{100 * r.results['reader']['right']:.1f} % of other captions right.")
    rows, dots = [], defaultdict(list)
    for run in training_runs():
        results = r.seeds(run.name)
        cells = [Spread(tuple(result[key] for result in results), scale, digits)
                 if key in results[0] else "-" for key, scale, digits in
                 (("cosine", 1, 3), ("distance", 1, 3), ("reader", 100, 1))]
        rights = tuple(rate(result["right"]) for result in results)
        rows.append([run.name, *cells, Spread(rights)])
        for result, right in zip(results, rights, strict=True):
            for key in ("cosine", "distance", "reader"):
                if key in result:
                    dots[run.variant, key].append((result[key], right, run))
    r.table(["aligner", "cosine", "relative distance", "reader, %", "drawn right, %"], rows)
    r.table(["rank correlation with accuracy", "cosine", "relative distance", "reader"],
            [[variant.upper(), *(rank_correlation(*zip(*[dot[:2] for dot in dots[variant, key]],
                                                       strict=True))
                                 for key in ("cosine", "distance", "reader"))]
             for variant in RECIPES], "Over all aligners and seeds.")

    def draw(*axes):
        for axis, key in zip(axes, ("cosine", "reader"), strict=True):
            for number, variant in enumerate(RECIPES):
                for is_ours in (False, True):
                    points = [(x * (100 if key == "reader" else 1), 100 * y)
                              for x, y, run in dots[variant, key]
                              if ("--encoder-loss" in run.flags) == is_ours]
                    axis.scatter(*zip(*points, strict=True), color=COLORS[number], s=28,
                                 marker=MARKERS[number], facecolor=None if is_ours else "none",
                                 label=f"{variant.upper()}{', encoder term' * is_ours}")
        axes[0].legend(frameon=False)

    y = "drawn right, %"
    r.plot("transfer", [("", "cosine of x' to T5's encoder outputs", y),
                        ("", "read right by the reader, %", y)], draw, (11, 4.5))


def lost_and_kept(r):
    plain = r.results["plain"]
    r.head("8. What is lost, what is kept", "Held-out R² within kinds (the mean of each kind is "
           "subtracted) of ridge regression from an answer's first 8 tokens (LVLM) or an image's "
           "17 (CLIP) to what no caption says: brightness and color of the object, its area and "
           f"its place from left to right. {len(plain['kinds'])} images of the details color and "
           "style. 0: nothing is known.")
    kept, rows = r.results["kept"], []
    sources = ["lvlm x", "lvlm T5 of the words", "clip x"]
    sources += [f"{variant} x' {recipe}" for variant in RECIPES for recipe in RECIPES[variant]]
    for source in sorted(sources, key=lambda name: not name.startswith("lvlm")):
        of_seeds = [values for name, values in kept.items()
                    if name == source or name.startswith(f"{source} seed ")]
        rows.append([source, *(Spread(values, 1, 2) for values in zip(*of_seeds, strict=True))])
    r.table(["R² from", *STATISTICS], rows)

    chosen = plain["redrawn"]
    kinds = torch.tensor([KINDS.index(tuple(plain["kinds"][i])) for i in chosen])
    before = torch.tensor([plain["statistics"][i] for i in chosen], dtype=torch.float64)
    rows = []
    for recipe in RECIPES["clip"]:
        for label, center in (("all", lambda v: v), ("within kinds",
                                                     lambda v: within_kind(v, kinds))):
            columns = []
            for result in r.drawn("redrawn", recipe):
                after = center(torch.tensor(result["statistics"], dtype=torch.float64))
                columns.append([torch.corrcoef(torch.stack(pair))[0, 1].nan_to_num().item()
                                for pair in zip(center(before).T, after.T, strict=True)])
            rows.append([recipe, label, *(Spread(v, 1, 2) for v in zip(*columns, strict=True))])
    r.table(["ThinkDiff-CLIP", "", *STATISTICS], rows, "Correlation between an image and the image "
            f"redrawn from it, {len(chosen)} images.")


def other_direction(r):
    r.head("9. What features could carry", f"{SIZES['shared']} questions, each asked twice: with "
           "the example images that show the most of a property, and with those that show the "
           f"least, of {SIZES['candidates']} held-out images of each kind. The VLM's words name "
           "neither. The difference is that of the drawn answers, paired by question, with its "
           "95 % interval over questions (mean over seeds).")
    methods = ["words", *RECIPES["lvlm"], WORDS_TOO]
    pairs = {"area, % of the image": ("large", "small"), "brightness, %": ("light", "dark")}
    columns = {}
    for label, (more, less) in pairs.items():
        at = STATISTICS.index(CONDITIONS[more][0])

        def difference(mores, lesses, at=at):
            n = len(mores)
            return Difference(tuple(sum(a[i][at] - b[i][at] for a, b in
                                        zip(mores, lesses, strict=True)) / n
                                    for i in range(SIZES["shared"])))

        examples = [[r.results[name]["examples"]] for name in (more, less)]
        columns[label] = [difference(*examples)]
        for method in methods:
            drawn = [[result["statistics"] for result in r.drawn(name, method)]
                     for name in (more, less)]
            columns[label].append(difference(*drawn))
    same = [sum(a == b for a, b in zip(r.results[more]["words"], r.results[less]["words"],
                                       strict=True)) for more, less in pairs.values()]
    rows = [[name, *cells] for name, *cells in
            zip(["the example images", *methods], *columns.values(), strict=True)]
    r.table(["difference between conditions", *columns], rows, "The VLM's words are the same in "
            f"both conditions for {' and '.join(map(str, same))} of {SIZES['shared']} questions.")

    rows, counts = [], [n for n in (1, 2, 4, 8) if n <= SIZES["draws"]]
    for method in ("words", *RECIPES["lvlm"]):
        lists = [r.drawn(f"sampled-{k}", method)[0]["right"] for k in range(SIZES["draws"])]
        rows.append([method, *(share([any(of) for of in zip(*lists[:n], strict=True)])
                               for n in counts)])
    r.table(["seed 0", *(f"best of {n}, %" for n in counts)], rows, "Best of N answers sampled at "
            "temperature 0.6: right if one of the N is, by the judge (an upper bound).")


def best_of(r):
    n_draws, result = SIZES["best_of"], r.results["best of"]
    r.head("10. Best of N images", f"{RECIPES['lvlm'][0]}, seed 0: {n_draws} images of each "
           "answer. VLM: the one of N from which it is likeliest to say its own words "
           "(`--best-of`). Oracle: right if one of the N is, by the judge. Not to be compared with "
           "figures of single images.")
    counts = [n for n in (1, 2, 4, 8) if n <= n_draws]
    chosen, any_right = [], []
    for n in counts:
        of_n = [[*zip(*result[key][:n], strict=True)] for key in ("right", "score")]
        chosen.append(share([right[max(range(n), key=scores.__getitem__)]
                             for right, scores in zip(*of_n, strict=True)]))
        any_right.append(share([any(right) for right in of_n[0]]))
    r.table(["right, %", *(f"N = {n}" for n in counts)],
            [["chosen by the VLM", *chosen], ["oracle", *any_right]])


def times(r):
    """The seconds of training, from the rates in log.csv; also in times.json."""
    seconds = {}
    for run in training_runs():
        for seed in range(SIZES["seeds"]):
            log = r.place.out / "runs" / f"{run.name}-seed{seed}" / "log.csv"
            rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
            n_steps = [int(b[0]) - int(a[0]) for a, b in zip([[0], *rows], rows, strict=False)]
            seconds[f"{run.name}-seed{seed}"] = sum(
                64 * n / float(row[4]) for n, row in zip(n_steps, rows, strict=True))
    write_json(r.place.out / "times.json", seconds)
    r.section = ""
    r.lines += ["\n## Training seconds (not reproducible)\n",
                "One process beside another, held-out losses excluded; also in times.json.\n",
                "| recipe | mean [range] |", "|---|---|"]
    for name in (*RECIPES["lvlm"], *RECIPES["clip"]):
        values = tuple(seconds[f"{name}-seed{seed}"] for seed in range(SIZES["seeds"]))
        r.lines.append(f"| {name} | {Spread(values, 1, 0)} |")


def write(place):
    """Writes everything that the results of all jobs give."""
    r = Report(place)
    with open("/proc/cpuinfo") as file:
        models = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    r.lines += [
        "# The paper's claims, measured in the miniature\n",
        f"`python -m miniature {' '.join(sys.argv[1:])}` on {datetime.date.today()}; "
        f"{', '.join(models) or platform.machine()}, {os.cpu_count()} cores, two processes of one "
        f"thread; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, diffusers {diffusers.__version__}.\n",
        f"Aligners of {SIZES['seeds']} seeds each on {SIZES['images']} images unless said; LVLM "
        f"{SIZES['lvlm']} steps (-long: {SIZES['long']}), CLIP {SIZES['clip']}; held-out questions "
        "and images, "
        f"{SIZES['flux_steps']} FLUX steps ({'bf16' if muon.has_bf16() else 'fp32'} products), "
        "`--true-cfg 3`, judged by the mini CLIP: "
        "right if it sees noun and value, among ten each. In brackets (a to b): Wilson's 95 % "
        "interval over the questions of one seed; [a, b]: lowest and highest seed. encoder-L: "
        "with the encoder term, lambda L. Written by code; it draws no conclusions."]
    for section in (norms, masking, shots, steps, ablations, encoder_weights, transfers,
                    lost_and_kept, other_direction, best_of, times):
        section(r)
    write_json(place.out / "claims.json", {"sizes": SIZES, "tables": r.tables})
    write_atomically(place.out / "claims.md", "\n".join(r.lines) + "\n")
    print(place.out / "claims.md")
