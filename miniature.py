"""The miniature: the drawn world as data, and the stand-ins of the big models trained on it from nothing.

    python miniature.py draw --out data/mini --count 20000       # picture-caption WebDataset tars: KEY.png, KEY.txt
    python miniature.py cobsat --out data/cobsat                 # the 500 pictures in CoBSAT's folders, seen in no training
    python miniature.py train                                    # rebuild mini/ : t5, vae, clip, vlm, flux (about four hours on two cores)
    python miniature.py train clip vlm                           # only these
    python miniature.py check --json results/check.json          # how good is each stand-in on held-out pictures?
    python miniature.py sheet --out outputs/world.png            # all 500 kinds on one page

The stand-ins are the real classes with tiny configurations (standins/*.py); every script loads them by path like the real
models. `train` goes on after a kill from what it left in build/.
"""
import argparse
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common import MINI, REPO, UserError, positive, run, write_atomically, write_json
from world import DETAILS, NOUNS, PAIRS, SIZE, an, caption, draw, shown

TAR_SIZE = 1000  # samples a tar
PARTS = ("t5", "vae", "clip", "vlm", "flux")  # in an order in which each finds what it needs
FAST_MALLOC = {  # glibc otherwise returns a step's memory to the system and fetches it again at the next: FLUX trains 3 x slower
    "MALLOC_MMAP_THRESHOLD_": str(2 ** 32), "MALLOC_TRIM_THRESHOLD_": str(2 ** 33), "MALLOC_TOP_PAD_": str(2 ** 28), "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------- data
def _write_tar(job):
    path, first, count, seed = job

    def write(temporary):
        with tarfile.open(temporary, "w") as tar:
            for number in range(first, first + count):
                rng = random.Random(f"draw {seed} {number}")
                kind = rng.choice(PAIRS)
                picture = io.BytesIO()
                draw(rng, *kind).save(picture, "PNG")
                for suffix, data in (("png", picture.getvalue()), ("txt", caption(rng, *kind, create=rng.random() < 0.5).encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_atomically(path, write)


def draw_data(args):
    """`draw`: random kinds, pictures and captions, as tars of TAR_SIZE samples; tars that are there already are kept."""
    out = Path(args.out)
    settings = {"count": args.count, "seed": args.seed}
    if (out / "drawn.json").exists() and (found := json.loads((out / "drawn.json").read_text())) != settings:
        raise UserError(f"{out} holds data drawn with {found}, not {settings}: choose another --out")
    write_json(out / "drawn.json", settings)
    jobs = [(out / f"{k:05d}.tar", k * TAR_SIZE, min(TAR_SIZE, args.count - k * TAR_SIZE), args.seed) for k in range(-(-args.count // TAR_SIZE))]
    jobs = [job for job in jobs if not job[0].exists()]
    with multiprocessing.Pool() as pool:
        for _ in tqdm(pool.imap_unordered(_write_tar, jobs), "drawing", len(jobs), unit="tar"):
            pass
    print(f"{args.count} pictures with captions: {out}")


def draw_cobsat(args):
    """`cobsat`: one picture of each kind at datasets/DETAIL_NOUN/VALUE_NOUN.jpg, CoBSAT's layout, from seeds of its own."""
    for detail, value, noun in tqdm(PAIRS, "drawing"):
        path = Path(args.out) / "datasets" / f"{detail}_{noun}" / f"{value}_{noun}.jpg"
        image = draw(random.Random(f"cobsat {value} {noun}"), detail, value, noun)
        write_atomically(path, lambda temporary: image.save(temporary, "JPEG", quality=95))
    print(f"500 pictures: {Path(args.out) / 'datasets'}")


def draw_sheet(args):
    """`sheet`: a contact sheet of the 500 kinds, a row a value, a column a noun."""
    sheet = Image.new("RGB", (len(DETAILS) * 10 * (SIZE + 2), 10 * (SIZE + 2)), "white")
    for block, detail in enumerate(DETAILS):
        for row, value in enumerate(DETAILS[detail]):
            for column, noun in enumerate(NOUNS[detail]):
                sheet.paste(draw(random.Random(f"sheet {value} {noun}"), detail, value, noun), ((block * 10 + column) * (SIZE + 2), row * (SIZE + 2)))
    write_atomically(args.out, lambda temporary: sheet.save(temporary, "PNG"))
    print(args.out)


# ---------------------------------------------------------------- stand-ins
def train(args):
    """`train`: each part in a process of its own with FAST_MALLOC; FLUX on as many processes as there are cores."""
    for part in args.parts or PARTS:
        command = [sys.executable, "-m", f"standins.{part}"]
        if part == "flux" and (os.cpu_count() or 1) > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] + command[1:]
        print(f"[{part}]", " ".join(command[1:]), flush=True)
        if code := subprocess.run(command, cwd=REPO, env={**os.environ, **FAST_MALLOC}).returncode:
            raise UserError(f"training of {part} ended with code {code}: see above; the same command goes on from the last saved state")
    if "flux" in (args.parts or PARTS):
        from standins import flux
        flux.assemble(REPO / "build", REPO / "mini")


def check(args):
    """`check`: accuracy of each stand-in on pictures and texts that no training has seen."""
    from standins import clip, flux, t5, vlm
    results = {}
    for name, measure in (("t5", t5.check), ("clip", clip.check), ("vlm", vlm.check), ("flux", flux.check)):
        if name in args.parts or not args.parts:
            results[name] = measure(REPO / "mini", args.count)
            print(name, json.dumps(results[name], indent=1), flush=True)
    if "lvlm" in args.parts or not args.parts:
        results["lvlm"] = check_lvlm(args.aligner, args.count)
        print("lvlm", json.dumps(results["lvlm"], indent=1), flush=True)
    if "compose" in args.parts or not args.parts:
        results["compose"] = check_compose(args.clip_aligner, args.count)
        print("compose", json.dumps(results["compose"], indent=1), flush=True)
    if args.json:
        write_json(args.json, {"count": args.count, **results})


def contexts(count, seed):
    """In-context questions on held-out pictures: [(parts as thinkdiff_lvlm takes them, the answer's (detail, value, noun))].

    2 and 4 shots in turn, the five details in turn; half ask for a value of a fixed noun, half for a noun with a fixed value (the ten
    tasks of CoBSAT). Not the benchmark's fixed list: that is cobsat_eval.py's."""
    from standins.pictures import held_out
    out = []
    for i in range(count):
        rng = random.Random(f"contexts {seed} {i}")
        detail, shots = list(DETAILS)[i % 5], 2 + 2 * (i // 5 % 2)
        by_value = i // 10 % 2 == 0
        words = rng.sample(DETAILS[detail] if by_value else NOUNS[detail], shots + 1)
        shared = rng.choice(NOUNS[detail] if by_value else DETAILS[detail])
        kinds = [(detail, word, shared) if by_value else (detail, shared, word) for word in words]
        parts = []
        for number, (word, kind) in enumerate(zip(words, kinds), 1):
            parts.append(("text", "\n\n" * (number > 1) + f"Word {number}: {shown(word)}, "))
            if number <= shots:
                parts.append(("image", Image.fromarray(held_out(PAIRS.index(kind), rng.randrange(10 ** 5)))))
        out.append((parts, kinds[-1]))
    return out


def sheet_of(images):
    """Pictures on one page, 20 a row."""
    sheet = Image.new("RGB", (20 * SIZE, -(-len(images) // 20) * SIZE))
    for i, image in enumerate(images):
        sheet.paste(image, (i % 20 * SIZE, i // 20 * SIZE))
    return sheet


def check_lvlm(aligner_path, count, seed=0, batch=50, steps=28, guidance=3.0):
    """The whole chain on held-out contexts, judged by the mini CLIP (arg-max over ten nouns and ten values): {name: shares}.

    relay: the VLM's words through T5's encoder; thinkdiff: its features through the aligner. `of relay` is the share of the
    relay's right pictures that ThinkDiff draws right too."""
    import torch
    import thinkdiff_lvlm as t
    from aligner import load_aligner
    from prepare_data import encode_messages, generate_with_features, load_vlm
    from standins import clip, vlm as vlm_check
    asked = contexts(count, seed)
    model, processor = load_vlm(REPO / "mini/qwen2-vl", "cpu", torch.float32)
    aligner, pipe = load_aligner(aligner_path), t.load_flux(REPO / "mini/flux", "cpu", torch.float32, t5_encoder=True)
    words, prompts = [], []
    with torch.no_grad():
        for at in tqdm(range(0, count, batch), "thinking"):
            inputs = encode_messages(processor, [t.context_message(parts, t.INSTRUCTION) for parts, _ in asked[at:at + batch]])
            tokens, x, lengths = generate_with_features(model, inputs, 64, ignore_eos=False, do_sample=False)
            words += [processor.tokenizer.decode(y[:n], skip_special_tokens=True) for y, n in zip(tokens, lengths.tolist())]
            prompts += [aligner(x_c[:n][None])[0] for x_c, n in zip(x, lengths.tolist())]
        relayed = [e for at in range(0, count, batch) for e in t.text_embeds(pipe, words[at:at + batch], 48)]
    judge = clip.load(REPO / "mini")
    right = {"vlm": [vlm_check.said(text, *kind) for text, (_, kind) in zip(words, asked)]}
    for name, embeds in (("relay", relayed), ("thinkdiff", prompts)):
        images, bar = [None] * count, tqdm(total=count, desc=f"drawing {name}")
        for same in t.equal_lengths(list(zip(embeds, range(count))), batch):
            seeds = [i for _, i in same]
            for i, image in zip(seeds, t.draw(pipe, torch.stack([e for e, _ in same]), [""] * len(same), seeds, SIZE, steps, 3.5, guidance)):
                images[i] = image
            bar.update(len(same))
        seen = clip.judge(*judge, images, [kind[0] for _, kind in asked])
        right[name] = [pair == kind[1:] for pair, (_, kind) in zip(seen, asked)]
        write_atomically(f"outputs/check-{name}.png", lambda temporary: sheet_of(images).save(temporary, "PNG"))
    both = [a and b for a, b in zip(right["relay"], right["thinkdiff"])]
    result = {name: round(sum(values) / count, 4) for name, values in right.items()}
    result["thinkdiff of relay"] = round(sum(both) / max(1, sum(right["relay"])), 4)
    for k, detail in enumerate(DETAILS):
        result[detail] = {name: round(sum(values[k::5]) / len(values[k::5]), 4) for name, values in right.items()}
    return {**result, "n": count, "aligner": os.path.relpath(aligner_path, REPO)}


def check_compose(aligner_path, count, seed=0, batch=50, steps=28, guidance=3.0):
    """ThinkDiff-CLIP on held-out pictures, judged by the mini CLIP: {name: shares}.

    I: a picture alone, redrawn with its noun and its value. I + T: with the text "a NOUN" of another noun; `noun` counts where
    that noun is drawn, `value` where the picture's value is. Beside it the picture alone and the text alone by the same two counts."""
    import torch
    import thinkdiff_clip as t
    from aligner import load_aligner
    from standins import clip
    from standins.pictures import held_out
    rng, tower = random.Random(seed), t.load_clip(MINI["clip"], "cpu", torch.float32)
    kinds = [PAIRS[i % len(PAIRS)] for i in rng.sample(range(max(count, len(PAIRS))), count)]
    others = [rng.choice([noun for noun in NOUNS[detail] if noun != own]) for detail, _, own in kinds]
    aligner, pipe, judge = load_aligner(aligner_path), t.load_flux(MINI["flux"], "cpu", torch.float32, t5_encoder=True), clip.load(REPO / "mini")
    pictures = [Image.fromarray(held_out(PAIRS.index(kind), rng.randrange(10 ** 5))) for kind in kinds]
    share = lambda rows: dict(zip(("noun", "value", "both"), (round(sum(column) / len(rows), 4) for column in zip(*rows))))

    def counted(seen, nouns):
        right = [(s[1] == noun, s[0] == kind[1], s == (kind[1], noun)) for s, noun, kind in zip(seen, nouns, kinds)]
        return {**share(right), **{d: share([r for r, kind in zip(right, kinds) if kind[0] == d]) for d in DETAILS}}

    result = {}
    for name in ("I", "I + T", "T alone"):
        images, bar = [], tqdm(total=count, desc=f"drawing {name}")
        for at in range(0, count, batch):
            part = range(at, min(at + batch, count))
            words = ["" if name == "I" else an(others[i]) for i in part]
            with torch.no_grad():
                x = t.image_tokens(tower, torch.stack([t.preprocess(pictures[i], tower.config.image_size) for i in part]))  # (B, 17, d_vlm)
                prompt = [*([aligner(x)] if name != "T alone" else []), *([t.text_embeds(pipe, words, 48)] if name != "I" else [])]
            images += t.draw(pipe, torch.cat(prompt, 1), words, list(part), SIZE, steps, 3.5, guidance)
            bar.update(len(part))
        seen = clip.judge(*judge, images, [kind[0] for kind in kinds])
        if name == "I":
            result["I"], result["I, as I + T is counted"] = counted(seen, [kind[2] for kind in kinds]), counted(seen, others)
        else:
            result[name] = counted(seen, others)
        write_atomically(f"outputs/check-{name.replace(' ', '')}.png", lambda temporary: sheet_of(images[:200]).save(temporary, "PNG"))
    return {**result, "n": count, "aligner": os.path.relpath(aligner_path, REPO)}


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = commands.add_parser("draw", help="picture-caption tars", **shown)
    p.add_argument("--out", default="data/mini", help="folder for the tars")
    p.add_argument("--count", type=positive, default=20000, help="pictures")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=draw_data)
    p = commands.add_parser("cobsat", help="the 500 pictures in CoBSAT's layout", **shown)
    p.add_argument("--out", default="data/cobsat", help="folder")
    p.set_defaults(run=draw_cobsat)
    p = commands.add_parser("sheet", help="contact sheet of the world", **shown)
    p.add_argument("--out", default="outputs/world.png", help="PNG")
    p.set_defaults(run=draw_sheet)
    p = commands.add_parser("train", help="rebuild the stand-ins in mini/", **shown)
    p.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help=f"any of {', '.join(PARTS)} (none: all)")
    p.set_defaults(run=train)
    p = commands.add_parser("check", help="accuracy of the stand-ins on held-out pictures", **shown)
    p.add_argument("parts", nargs="*", choices=("t5", "clip", "vlm", "flux", "lvlm", "compose"), metavar="PART",
                   help="t5, clip, vlm, flux; lvlm: all of ThinkDiff-LVLM; compose: of ThinkDiff-CLIP (none: all)")
    p.add_argument("--aligner", default=MINI["aligner"], help="for lvlm")
    p.add_argument("--clip-aligner", default=MINI["aligner-clip"], help="for compose")
    p.add_argument("--count", type=positive, default=500, help="questions or pictures of each sort")
    p.add_argument("--json", help="also write the figures to this file")
    p.set_defaults(run=check)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
