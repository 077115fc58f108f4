"""The drawn world of the miniature: CoBSAT's vocabulary as words and as 64 x 64 pictures.

Ten objects and ten animals, each combined with ten values of one of five details: 500 kinds of picture
(protocol: CoBSAT, Zeng et al. 2024). Nothing here is learned; `miniature.py` trains the stand-in models on it.

    from world import DETAILS, draw, caption
    draw(random.Random(0), "color", "white", "car").save("white_car.png")
    caption(random.Random(0), "color", "white", "car")      # "A picture of a white car. The car is white. ..."
"""
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ---------------------------------------------------------------- vocabulary (order matters: CoBSAT's indices)
DETAILS = {
    "color": "yellow white red purple pink orange green brown blue black".split(),
    "background": "beach desert glacier volcano park gym waterfall space cave seafloor".split(),
    "style": "watercolor sketch pixel origami lego icon graffiti futuristic 3d old".split(),
    "action": "swim sleep sing run read fly eat drink cry angry".split(),
    "texture": "wood wicker sequined plastic paper metal leather lace denim ceramic".split(),
}
OBJECTS = "leaf hat cup chair car box book ball bag apple".split()
ANIMALS = "zebra tiger sheep pig monkey lion dog cow cat bird".split()
NOUNS = {d: ANIMALS if d in ("background", "action") else OBJECTS for d in DETAILS}
SHOWN = {"3d": "wireframe", "park": "amusement park"}  # words shown instead of labels
PAIRS = [(d, v, o) for d in DETAILS for v in DETAILS[d] for o in NOUNS[d]]  # the 500 kinds
SIZE = 64  # px


def shown(word):
    """The word a person reads for a label: `3d` -> `wireframe`, `park` -> `amusement park`, others unchanged."""
    return SHOWN.get(word, word)


def an(noun):
    """`a car`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---------------------------------------------------------------- captions
ING = dict(swim="swimming", sleep="sleeping", sing="singing", run="running", read="reading", fly="flying",
           eat="eating", drink="drinking", cry="crying", angry="angry")
PLACE = dict(beach="on the beach", desert="in the desert", glacier="on a glacier", volcano="near a volcano",
             park="in an amusement park", gym="in a gym", waterfall="by a waterfall", space="in space",
             cave="in a cave", seafloor="on the seafloor")
NOUN_PHRASES = {  # {v} value, {o} noun, {i} the action's -ing form, {p} place; `a` before a vowel becomes `an`
    "color": ["a {v} {o}", "a {v} {o}", "a {o} painted {v}", "a {o} in {v}", "a {o} that is {v}"],
    "background": ["a {o} {p}", "a {o} {p}", "a {o} with a {v} background", "a {o} with a {v} behind it",
                   "a {v} scene with a {o}"],
    "style": ["a {v} style {o}", "a {o} in {v} style", "a {v} {o}", "a {o} drawn in {v} style"],
    "action": ["a {i} {o}", "a {o} that is {i}", "a {i} {o}", "a {o} which is {i}"],
    "texture": ["a {v} {o}", "a {o} made of {v}", "a {o} with a {v} texture", "a {o} made from {v}"],
}
CLAUSES = {  # sentences that name the noun and the value
    "color": ["the {o} is {v}", "the color of the {o} is {v}", "the {o} has a {v} color", "the {o} looks {v}"],
    "background": ["the {o} is {p}", "behind the {o} is a {v}", "the {o} has a {v} background",
                   "the background of the {o} is a {v}"],
    "style": ["the {o} is in {v} style", "the style of the {o} is {v}", "the {o} has a {v} style",
              "the {o} is drawn in {v} style"],
    "action": ["the {o} is {i}", "the {o} looks like it is {i}", "you can see the {o} is {i}", "what the {o} does is {i}"],
    "texture": ["the {o} is made of {v}", "the texture of the {o} is {v}", "the {o} has a {v} texture",
                "the {o} is made from {v}"],
}
DESCRIBE = ["{n}", "a picture of {n}", "an image of {n}", "this image shows {n}", "there is {n} in the picture",
            "the picture shows {n}", "here we see {n}", "we can see {n}", "this is {n}", "it is {n}"]
CREATE = ["create an image of {n}", "create an image of {n}", "create an image that shows {n}", "draw {n}",
          "generate a picture of {n}", "make a picture of {n}"]


def _fill(template, detail, value, noun):
    word = ING[value] if detail == "action" else shown(value)
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format(v=word, i=word, o=noun, p=PLACE.get(value)))


def label(detail, value, noun):
    """CoBSAT's own wording of a kind, `white car`; with the shown words, the text of the CLIP judge's similarity."""
    return f"{shown(value)} {noun}"


def noun_phrase(rng, detail, value, noun):
    """`a red car`, `a zebra that is flying`, ...: one of several paraphrases, without a full stop."""
    return _fill(rng.choice(NOUN_PHRASES[detail]), detail, value, noun)


def sentence(rng, detail, value, noun, frames=None, settled=False):
    """One sentence that names noun and value, with capital and full stop. `frames`: DESCRIBE, CREATE or None for any.

    settled: the beginning (`This image shows`) decides the paraphrase, so that whoever has begun a sentence knows its next word."""
    if frames is None and rng.random() < 0.4:
        text = _fill(rng.choice(CLAUSES[detail]), detail, value, noun)
    else:
        frame = rng.choice(frames or DESCRIBE)
        phrases = NOUN_PHRASES[detail]
        phrase = phrases[(DESCRIBE + CREATE).index(frame) % len(phrases)] if settled else rng.choice(phrases)
        text = frame.format(n=_fill(phrase, detail, value, noun))
    return text[0].upper() + text[1:] + "."


def caption(rng, detail, value, noun, create=False, sentences=None):
    """A caption of 1 to 4 sentences, each naming noun and value (7 to 45 words).

    create: begin as a prompt for a diffusion model (`Create an image of ...`) instead of a description.
    sentences: how many; drawn at random (more often few than many) when None.
    """
    count = sentences or rng.choice([1, 1, 1, 2, 2, 3, 4])
    first = sentence(rng, detail, value, noun, CREATE if create else DESCRIBE)
    return " ".join([first] + [sentence(rng, detail, value, noun) for _ in range(count - 1)])


# ---------------------------------------------------------------- shapes in unit coordinates (x right, y down, -1 .. 1)
# A shape is (points, paint) for a filled polygon or (points, paint, width) for a line. `paint` is an RGB tuple or a
# number: the noun's own color times that number, the part that a color or a texture fills.
INK, WHITE, CREAM, GLASS, TEAR = (28, 26, 32), (250, 250, 250), (244, 236, 208), (170, 215, 240), (70, 150, 245)


def ell(cx, cy, rx, ry, start=0, end=360, n=26):
    """Points of an ellipse (or of its arc from `start` to `end` degrees, clockwise from 3 o'clock)."""
    return [(cx + rx * math.cos(math.radians(start + (end - start) * i / n)),
             cy + ry * math.sin(math.radians(start + (end - start) * i / n))) for i in range(n + 1)]


def rect(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def mirror(points):
    return [(-x, y) for x, y in points]


def _apple():
    out = []
    for i in range(36):
        a = 2 * math.pi * i / 36
        r = 0.62 + 0.24 * abs(math.cos(a)) ** 0.7 + (0.12 if math.sin(a) > 0 else 0) * math.sin(a) ** 2
        out.append((r * math.cos(a), 0.1 + r * math.sin(a)))
    return out


def _leaf():
    right = [(0.56 * math.sin(math.pi * t) ** 0.8 * (1.15 - 0.5 * t), 0.65 - 1.6 * t) for t in (i / 14 for i in range(15))]
    return right + mirror(right)[::-1]


OBJECT_SHAPES = {
    "leaf": [([(0, 0.6), (0.06, 0.98)], (96, 70, 40), 0.1), (_leaf(), 1.0), ([(0, 0.65), (0, -0.85)], 0.6, 0.06)]
    + [([(0, y), (s * 0.26, y - 0.24)], 0.6, 0.045) for y in (0.4, 0.05, -0.3) for s in (-1, 1)],
    "hat": [(ell(0, 0.5, 0.98, 0.24), 1.0), ([(-0.55, 0.52), (-0.48, -0.65), (0.48, -0.65), (0.55, 0.52)], 1.0),
            ([(-0.55, 0.5), (-0.53, 0.2), (0.53, 0.2), (0.55, 0.5)], 0.45), (ell(0, -0.65, 0.48, 0.12), 0.8)],
    "cup": [(ell(0.42, 0.02, 0.34, 0.34, -80, 80), 0.85, 0.17), ([(-0.72, -0.55), (0.46, -0.55), (0.34, 0.75), (-0.6, 0.75)], 1.0),
            (ell(-0.13, -0.55, 0.59, 0.16), 0.55)],
    "chair": [(rect(-0.46, 0.3, -0.34, 0.75), 0.6), (rect(0.34, 0.3, 0.46, 0.75), 0.6), (rect(-0.55, -0.98, 0.55, 0.05), 1.0),
              (rect(-0.3, -0.75, -0.18, -0.05), 0.6), (rect(-0.06, -0.75, 0.06, -0.05), 0.6), (rect(0.18, -0.75, 0.3, -0.05), 0.6),
              ([(-0.55, 0.05), (0.55, 0.05), (0.72, 0.38), (-0.72, 0.38)], 0.9), (rect(-0.7, 0.38, -0.54, 0.98), 0.8),
              (rect(0.54, 0.38, 0.7, 0.98), 0.8)],
    "car": [([(-1, 0.35), (-0.97, 0), (-0.62, -0.1), (-0.36, -0.55), (0.3, -0.55), (0.62, -0.1), (0.97, 0.03), (1, 0.35)], 1.0),
            ([(-0.47, -0.1), (-0.28, -0.43), (-0.05, -0.43), (-0.05, -0.1)], GLASS),
            ([(0.05, -0.1), (0.05, -0.43), (0.24, -0.43), (0.44, -0.1)], GLASS), (ell(-0.54, 0.38, 0.25, 0.25), (45, 45, 50)),
            (ell(0.54, 0.38, 0.25, 0.25), (45, 45, 50)), (ell(-0.54, 0.38, 0.1, 0.1), (200, 200, 205)),
            (ell(0.54, 0.38, 0.1, 0.1), (200, 200, 205)), (ell(0.9, 0.12, 0.07, 0.07), (255, 240, 140))],
    "box": [(rect(-0.8, -0.22, 0.35, 0.85), 1.0), ([(-0.8, -0.22), (-0.38, -0.68), (0.8, -0.68), (0.35, -0.22)], 1.15),
            ([(0.35, -0.22), (0.8, -0.68), (0.8, 0.38), (0.35, 0.85)], 0.7),
            ([(-0.34, 0.2), (-0.34, -0.22), (0.1, -0.68), (0.3, -0.68), (-0.12, -0.22), (-0.12, 0.2)], 0.55)],
    "book": [([(0.55, -0.9), (0.68, -0.76), (0.68, 0.92), (-0.5, 0.92), (-0.6, 0.78), (0.55, 0.78)], CREAM),
             (rect(-0.62, -0.9, 0.56, 0.78), 1.0), (rect(-0.62, -0.9, -0.42, 0.78), 0.6), (rect(-0.22, -0.62, 0.4, -0.3), CREAM),
             ([(-0.1, -0.46), (0.28, -0.46)], INK, 0.06), ([(-0.15, 0.35), (0.32, 0.35)], 0.55, 0.07)],
    "ball": [(ell(0, 0, 0.88, 0.88), 1.0), ([(0, -0.88), (0, 0.88)], 0.5, 0.055), ([(-0.88, 0), (0.88, 0)], 0.5, 0.055),
             (ell(-0.95, 0, 0.5, 0.72, -55, 55), 0.5, 0.055), (ell(0.95, 0, 0.5, 0.72, 125, 235), 0.5, 0.055)],
    "bag": [(ell(0, -0.1, 0.42, 0.72, 180, 360), 0.7, 0.14), ([(-0.88, 0.88), (-0.68, -0.15), (0.68, -0.15), (0.88, 0.88)], 1.0),
            ([(-0.68, -0.15), (0.68, -0.15), (0.5, 0.32), (-0.5, 0.32)], 0.75), (ell(0, 0.32, 0.1, 0.1), (240, 200, 70))],
    "apple": [(_apple(), 1.0), ([(0, -0.5), (0.08, -0.95)], (96, 64, 36), 0.1),
              ([(0.08, -0.7), (0.3, -0.95), (0.6, -0.92), (0.38, -0.68)], (90, 175, 70))],
}
OBJECT_COLOR = dict(leaf=(75, 165, 70), hat=(70, 80, 150), cup=(60, 160, 170), chair=(160, 105, 60), car=(210, 60, 55),
                    box=(200, 160, 105), book=(65, 110, 190), ball=(235, 130, 50), bag=(150, 75, 160), apple=(205, 45, 50))
COLORS = dict(yellow=(248, 218, 48), white=(250, 250, 250), red=(214, 38, 40), purple=(122, 50, 165), pink=(252, 145, 195),
              orange=(246, 138, 28), green=(48, 158, 66), brown=(118, 70, 36), blue=(44, 88, 215), black=(36, 36, 40))

# animals: a big front-facing head at (0, -0.35) and a small body, so that a face is read at 64 px
BODY = ell(0, 0.5, 0.4, 0.42)
FEET = [ell(-0.22, 0.9, 0.17, 0.1), ell(0.22, 0.9, 0.17, 0.1)]


def _stripes(xs, y0, y1, lean=0.0):
    return [([(x, y0), (x + lean * (1 if x > 0 else -1), y1)], INK, 0.075) for x in xs]


def _wool(cx, cy, rx, ry, size, n):
    return [(ell(cx + rx * math.cos(2 * math.pi * i / n), cy + ry * math.sin(2 * math.pi * i / n), size, size), 1.0) for i in range(n)]


def animal_shapes(noun):
    """The shapes of an animal without eyes (they depend on what it does) and its color."""
    def both(points, paint):
        return [(points, paint), (mirror(points), paint)]
    plain = [(f, 0.85) for f in FEET] + [(BODY, 1.0)]
    if noun == "zebra":
        return plain + _stripes((-0.3, -0.1, 0.1, 0.3), 0.3, 0.75, 0.06) + both([(-0.3, -0.7), (-0.42, -1), (-0.14, -0.8)], 1.0) + [
            (ell(0, -0.42, 0.37, 0.5), 1.0), ([(-0.14, -0.98), (0.14, -0.98), (0.07, -0.6), (-0.07, -0.6)], INK)] + [
            ([(s * 0.36, y), (s * 0.17, y + 0.06)], INK, 0.075) for s in (-1, 1) for y in (-0.62, -0.45, -0.1)] + [
            (ell(0, -0.02, 0.27, 0.2), (75, 72, 80))], (246, 246, 246)
    if noun == "tiger":
        return plain + [([(s * 0.39, y), (s * 0.15, y + 0.04)], INK, 0.075) for s in (-1, 1) for y in (0.4, 0.6)] + both(
            ell(-0.4, -0.72, 0.17, 0.17), 1.0) + [(ell(0, -0.35, 0.54, 0.47), 1.0)] + _stripes((-0.16, 0, 0.16), -0.8, -0.58) + [
            ([(s * 0.53, y), (s * 0.32, y + 0.02)], INK, 0.075) for s in (-1, 1) for y in (-0.32, -0.14)] + [
            (ell(0, -0.12, 0.23, 0.17), WHITE), (ell(0, -0.2, 0.09, 0.06), (225, 110, 120))], (242, 145, 40)
    if noun == "sheep":
        return [(f, (70, 66, 72)) for f in FEET] + _wool(0, 0.45, 0.3, 0.22, 0.24, 8) + [(ell(0, 0.45, 0.34, 0.28), 1.0)] + _wool(
            0, -0.42, 0.4, 0.34, 0.2, 10) + both(ell(-0.45, -0.28, 0.2, 0.1), (88, 82, 88)) + [
            (ell(0, -0.24, 0.29, 0.36), (88, 82, 88))] + _wool(0, -0.62, 0.16, 0.04, 0.15, 3), (250, 247, 238)
    if noun == "pig":
        return plain + both([(-0.5, -0.55), (-0.5, -0.95), (-0.16, -0.74)], 0.85) + [
            (ell(0, -0.33, 0.53, 0.46), 1.0), (ell(0, -0.18, 0.25, 0.18), 0.78)] + both(ell(-0.09, -0.18, 0.04, 0.07), (130, 50, 70)), (250, 168, 185)
    if noun == "monkey":
        return [(ell(0.5, 0.45, 0.28, 0.3, 90, -120), 1.0, 0.1)] + plain + [(ell(0, 0.55, 0.24, 0.26), (228, 184, 140))] + both(
            ell(-0.54, -0.35, 0.21, 0.22), 1.0) + both(ell(-0.54, -0.35, 0.12, 0.13), (228, 184, 140)) + [
            (ell(0, -0.4, 0.47, 0.47), 1.0), (ell(-0.16, -0.42, 0.2, 0.2), (228, 184, 140)), (ell(0.16, -0.42, 0.2, 0.2), (228, 184, 140)),
            (ell(0, -0.16, 0.34, 0.22), (228, 184, 140)), (ell(0, -0.24, 0.06, 0.04), INK)], (122, 78, 48)
    if noun == "lion":
        return [([(0.3, 0.7), (0.68, 0.5), (0.75, 0.2)], 1.0, 0.08), (ell(0.76, 0.15, 0.12, 0.14), (150, 80, 30))] + plain + [
            (ell(0.5 * math.cos(a), -0.35 + 0.46 * math.sin(a), 0.22, 0.22), (158, 84, 30)) for a in (2 * math.pi * i / 11 for i in range(11))] + [
            (ell(0, -0.35, 0.55, 0.52), (158, 84, 30)), (ell(0, -0.33, 0.4, 0.38), 1.0), (ell(0, -0.14, 0.19, 0.14), WHITE),
            (ell(0, -0.21, 0.1, 0.06), INK)], (245, 196, 90)
    if noun == "dog":
        return [([(0.3, 0.6), (0.66, 0.25)], 1.0, 0.12)] + plain + [
            (ell(0, -0.38, 0.46, 0.46), 1.0), (ell(-0.18, -0.45, 0.17, 0.2), 0.6)] + both(ell(-0.5, -0.32, 0.16, 0.42), 0.5) + [
            (ell(0, 0.02, 0.09, 0.16), (235, 95, 110)), (ell(0, -0.16, 0.25, 0.2), WHITE), (ell(0, -0.26, 0.13, 0.09), INK)], (206, 158, 104)
    if noun == "cow":
        return plain + [(ell(-0.18, 0.42, 0.15, 0.16), INK), (ell(0.2, 0.66, 0.14, 0.12), INK)] + both(
            ell(-0.55, -0.5, 0.2, 0.11), INK) + both([(-0.2, -0.75), (-0.42, -1.02), (-0.36, -0.68)], (226, 208, 160)) + [
            (ell(0, -0.38, 0.42, 0.48), 1.0), (ell(0.2, -0.58, 0.21, 0.24), INK), (ell(0, -0.05, 0.36, 0.22), (246, 170, 175))] + both(
            ell(-0.14, -0.05, 0.05, 0.06), (140, 70, 80)), (250, 250, 250)
    if noun == "cat":
        return [([(0.3, 0.75), (0.66, 0.7), (0.7, 0.3), (0.6, 0.1)], 1.0, 0.11)] + plain + both(
            [(-0.5, -0.4), (-0.48, -1.02), (-0.1, -0.74)], 1.0) + both([(-0.42, -0.6), (-0.42, -0.86), (-0.24, -0.74)], (250, 170, 180)) + [
            (ell(0, -0.35, 0.51, 0.44), 1.0), (ell(0, -0.14, 0.2, 0.13), WHITE), ([(-0.07, -0.22), (0.07, -0.22), (0, -0.14)], (240, 110, 130))] + [
            ([(s * 0.22, -0.14), (s * 0.66, y)], WHITE, 0.035) for s in (-1, 1) for y in (-0.22, -0.06)], (120, 128, 142)
    return [([(s * 0.2, 0.6), (s * 0.22, 0.92)], (240, 150, 40), 0.09) for s in (-1, 1)] + both(
        [(-0.5, -0.1), (-0.92, 0.3), (-0.5, 0.45)], 0.7) + [([(-0.05, -0.7), (-0.16, -1), (0.03, -0.82), (0.14, -1), (0.12, -0.7)], 0.7),
        (ell(0, -0.05, 0.6, 0.68), 1.0), (ell(0, 0.3, 0.36, 0.3), WHITE), ([(-0.17, -0.2), (0.17, -0.2), (0, 0.1)], (250, 175, 40))], (80, 165, 235)


EYES = dict(zebra=(0.16, -0.5), sheep=(0.11, -0.32), bird=(0.22, -0.36), cow=(0.19, -0.5), monkey=(0.15, -0.42), lion=(0.16, -0.4),
            dog=(0.19, -0.46), cat=(0.21, -0.4), pig=(0.22, -0.46), tiger=(0.22, -0.4))  # +-x, y


def face_shapes(noun, action=None):
    """Eyes, brows, tears and mouth of an animal that does `action` (None: it just looks)."""
    x, y = EYES[noun]
    out = []
    for s in (-1, 1):
        if action == "sleep":
            out.append((ell(s * x, y, 0.1, 0.08, 0, 180), WHITE if noun == "sheep" else INK, 0.06))
        else:
            out += [(ell(s * x, y, 0.095, 0.11), WHITE), (ell(s * x, y + 0.01, 0.055, 0.07), INK)]
        if action == "angry":
            out.append(([(s * (x + 0.17), y - 0.26), (s * (x - 0.1), y - 0.08)], (190, 0, 0), 0.11))
        if action == "cry":
            out += [([(s * x - 0.09, y + 0.1), (s * x + 0.09, y + 0.1), (s * (x + 0.28) + 0.12, 0.95), (s * (x + 0.28) - 0.12, 0.95)], TEAR)]
    if action == "sing":
        out.append((ell(0, -0.02, 0.14, 0.18), (150, 20, 40)))
    return out


# ---------------------------------------------------------------- canvas: shapes -> pixels
BIG = 4 * SIZE  # everything is drawn four times as large and scaled down, for smooth edges


def shade(color, factor):
    """`color` times `factor`; a very dark color is lightened instead, so that inner lines stay visible."""
    if max(color) < 60 and factor < 1:
        return tuple(int(c + 70 * (1.2 - factor)) for c in color)
    return tuple(max(0, min(255, int(c * factor))) for c in color)


class Canvas:
    """A BIG x BIG picture with a jittered placement (position, size, rotation) of the unit square on it."""

    def __init__(self, rng, background, scale=0.4, dy=0.0):
        self.image = Image.new("RGB", (BIG, BIG), background)
        self.scale = BIG * scale * rng.uniform(0.9, 1.08)
        self.angle = math.radians(rng.uniform(-9, 9))
        self.x, self.y = BIG * (0.5 + rng.uniform(-0.05, 0.05)), BIG * (0.5 + dy + rng.uniform(-0.05, 0.05))

    def place(self, points):
        c, s = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        return [(self.x + c * px - s * py, self.y + s * px + c * py) for px, py in points]

    def paint(self, shapes, color, outline=INK, width=5, image=None):
        """Draws `shapes` in order, each polygon with an outline."""
        d = ImageDraw.Draw(image or self.image)
        for points, paint, *line in shapes:
            fill = paint if isinstance(paint, (tuple, int)) and not isinstance(paint, float) else shade(color, paint)
            placed = self.place(points)
            if line:
                if outline and line[0] >= 0.1:
                    d.line(placed, fill=outline, width=int(line[0] * self.scale) + 2 * width, joint="curve")
                d.line(placed, fill=fill, width=max(2, int(line[0] * self.scale)), joint="curve")
            else:
                d.polygon(placed, fill=fill)
                if outline:
                    d.line(placed + placed[:2], fill=outline, width=width, joint="curve")

    def mask(self, shapes, everything=False):
        """L picture: 255 where the noun's own color shows (or, with `everything`, the whole silhouette)."""
        m = Image.new("L", (BIG, BIG))
        for points, paint, *line in shapes:
            value = 255 if everything or isinstance(paint, float) else 0
            if line:
                ImageDraw.Draw(m).line(self.place(points), fill=value, width=max(2, int(line[0] * self.scale)), joint="curve")
            else:
                ImageDraw.Draw(m).polygon(self.place(points), fill=value)
        return m

    def grey(self, shapes):
        """L picture of the shading factors alone (128 = 1.0), to lay a noun's inner parts over a texture."""
        g = Image.new("L", (BIG, BIG), 128)
        self.paint([(p, (int(min(1.6, f) * 128),) * 3 if isinstance(f, float) else (128,) * 3, *w) for p, f, *w in shapes], WHITE, None,
                   image=(rgb := g.convert("RGB")))
        return rgb.convert("L")


def _grow(mask, px):
    """`mask` grown (px > 0) or shrunk (px < 0); a thresholded box blur, much faster than Pillow's rank filters."""
    return mask.filter(ImageFilter.BoxBlur(abs(px))).point(lambda v: 255 * (v > 6 if px > 0 else v > 249))


def _pick(rng, color, spread=14):
    """`color` with a jittered shade."""
    k = rng.uniform(-spread, spread)
    return tuple(max(0, min(255, int(c + k + rng.uniform(-6, 6)))) for c in color)


def _plain(rng):
    return _pick(rng, (214, 220, 226), 12)


# ---------------------------------------------------------------- the five details
YY, XX = np.mgrid[0:BIG, 0:BIG].astype(np.float32)


def texture(rng, value):
    """A BIG x BIG RGB picture of a material."""
    p, q = rng.uniform(0, 100), rng.uniform(0, 100)  # phases
    x, y = XX + p, YY + q
    def mix(a, b, t):
        t = np.clip(t, 0, 1)[..., None]
        return Image.fromarray((np.array(a, np.float32) * (1 - t) + np.array(b, np.float32) * t).astype(np.uint8))
    if value == "wood":
        return mix((205, 145, 80), (120, 70, 30), 0.5 + 0.5 * np.sin((y + 14 * np.sin(x / 40)) / 5.5))
    if value == "wicker":
        over = ((x // 26).astype(int) + (y // 26).astype(int)) % 2
        return mix((232, 196, 120), (120, 82, 36), np.where(over, np.abs(np.sin(y / 26 * math.pi)) < 0.35, np.abs(np.sin(x / 26 * math.pi)) < 0.35))
    if value == "sequined":
        r = np.hypot((x + (y // 22 % 2) * 11) % 22 - 11, y % 22 - 11)
        glint = np.random.default_rng(rng.randrange(1 << 30)).random((BIG // 22 + 6, BIG // 22 + 6))[(y // 22).astype(int), (x // 22).astype(int)]
        return mix((110, 10, 90), (255, 170, 240), np.where(r < 9.5, 0.25 + 0.75 * glint, 0))
    if value == "plastic":
        return mix((30, 205, 205), WHITE, np.exp(-(((x - p) + (y - q) - BIG * 0.78) / 17) ** 2) * 1.2)
    if value == "paper":
        fold = np.minimum(np.abs((x + 1.7 * y) % 90 - 45), np.abs((x - 0.8 * y) % 110 - 55))
        return mix((252, 252, 248), (175, 178, 190), 0.9 * (fold < 3) + 0.25 * (((x + 1.7 * y) // 90) % 2))
    if value == "metal":
        return mix((95, 102, 115), (245, 248, 252), 0.5 + 0.5 * np.sin((x - y) / 22))
    if value == "leather":
        noise = np.random.default_rng(rng.randrange(1 << 30)).random((BIG // 8, BIG // 8)).repeat(8, 0).repeat(8, 1)
        return mix((92, 48, 24), (58, 28, 12), noise)
    if value == "lace":
        r = np.hypot(x % 34 - 17, y % 34 - 17)
        return mix((255, 250, 252), (210, 120, 150), (r < 8) | (np.abs(r - 13) < 1.6))
    if value == "denim":
        return mix((40, 72, 132), (120, 158, 208), 0.5 + 0.5 * np.sin((x + y) / 4.2))
    petal = np.hypot(x % 64 - 32, y % 64 - 32) - 9 * np.cos(5 * np.arctan2(y % 64 - 32, x % 64 - 32))
    return mix((248, 250, 255), (30, 70, 190), (petal < 15) & (petal > -4))  # ceramic: blue flowers on white


def draw_texture(rng, value, noun):
    shapes = OBJECT_SHAPES[noun]
    c = Canvas(rng, _pick(rng, (168, 176, 160), 10) if value in ("paper", "ceramic", "lace") else _plain(rng))
    c.paint(shapes, WHITE)
    own, grey = c.mask(shapes), np.asarray(c.grey(shapes), np.float32) / 128
    filled = np.asarray(texture(rng, value), np.float32) * (0.35 + 0.65 * grey)[..., None] * rng.uniform(0.93, 1.05)
    c.image.paste(Image.fromarray(filled.clip(0, 255).astype(np.uint8)), mask=own)
    for points, paint, *line in shapes:  # outlines again, over the filling
        if not line:
            ImageDraw.Draw(c.image).line(c.place(points + points[:1]), fill=INK, width=5, joint="curve")
    if value in ("leather", "denim"):  # a seam
        inner = np.asarray(_grow(own, -8), bool) & ~np.asarray(_grow(own, -11), bool)
        dash = inner & (((XX + YY) // 9) % 2 == 0)
        c.image.paste((250, 225, 160) if value == "leather" else (245, 160, 60), mask=Image.fromarray(dash.astype(np.uint8) * 255))
    return c.image


def draw_color(rng, value, noun):
    c = Canvas(rng, _plain(rng))
    c.paint(OBJECT_SHAPES[noun], _pick(rng, COLORS[value], 10))
    return c.image


def _lines(image, step, color, width, slope=1, offset=0):
    d = ImageDraw.Draw(image)
    for k in range(-BIG * 2, BIG * 3, step):
        d.line([(k + offset, 0), (k + offset + slope * BIG, BIG)], fill=color, width=width)


def draw_style(rng, value, noun):
    shapes, own = OBJECT_SHAPES[noun], OBJECT_COLOR[noun]
    phase = rng.randrange(20)
    if value == "watercolor":
        c = Canvas(rng, (253, 251, 244))
        pale = tuple((x + 255) // 2 for x in _pick(rng, own, 20))
        c.paint(shapes, pale, None)
        wash = np.random.default_rng(rng.randrange(1 << 30)).random((8, 8)) * 110
        blot = Image.fromarray(wash.astype(np.uint8)).resize((BIG, BIG), Image.BICUBIC)
        spread = c.mask(shapes, True).filter(ImageFilter.GaussianBlur(13))
        base = c.image.filter(ImageFilter.GaussianBlur(6))
        base.paste(pale, mask=Image.eval(spread, lambda v: v // 2))
        return Image.composite(Image.new("RGB", (BIG, BIG), (255, 255, 255)), base, blot)
    if value == "sketch":
        c = Canvas(rng, (246, 244, 238))
        hatch = Image.new("RGB", (BIG, BIG), (246, 244, 238))
        _lines(hatch, 15, (120, 118, 118), 3, slope=-1, offset=phase)
        c.image.paste(hatch, mask=c.mask(shapes))
        for points, paint, *line in shapes:
            for _ in range(2):
                shake = [(px + rng.uniform(-0.02, 0.02), py + rng.uniform(-0.02, 0.02)) for px, py in points]
                ImageDraw.Draw(c.image).line(c.place(shake + ([] if line else shake[:1])), fill=(70, 68, 70), width=4)
        return c.image
    if value == "pixel":
        c = Canvas(rng, (92, 200, 120))
        c.paint(shapes, own, INK, 12)
        return c.image.resize((13, 13), Image.BOX).resize((BIG, BIG), Image.NEAREST)
    if value == "origami":
        c = Canvas(rng, (240, 226, 200))
        facets = Image.new("RGB", (BIG, BIG))
        d, paper = ImageDraw.Draw(facets), _pick(rng, (240, 90, 130), 10)
        for i in range(-1, 5):
            for j in range(-1, 5):
                a, b = i * 64 + phase, j * 64 + phase
                d.polygon([(a, b), (a + 64, b), (a, b + 64)], fill=shade(paper, 0.62 + 0.13 * ((i + 2 * j) % 4)))
                d.polygon([(a + 64, b + 64), (a + 64, b), (a, b + 64)], fill=shade(paper, 0.7 + 0.13 * ((2 * i + j) % 3)))
        _lines(facets, 64, WHITE, 3, slope=-1, offset=2 * phase)
        c.image.paste(facets, mask=c.mask(shapes, True))
        c.paint([(p, paint, 0.03) for p, paint in [(s[0], 0.45) for s in shapes if len(s) == 2]], (255, 150, 180), None)
        return c.image
    if value == "lego":
        c = Canvas(rng, (150, 210, 245))
        bricks = Image.new("RGB", (BIG, BIG))
        d = ImageDraw.Draw(bricks)
        palette = [(225, 30, 35), (250, 205, 20), (20, 105, 200), (20, 150, 70)]
        for j in range(-1, 8):
            for i in range(-1, 5):
                a, b = i * 72 + 36 * (j % 2) + phase, j * 36 + phase
                col = palette[(i + 3 * j) % 4]
                d.rectangle([a, b, a + 72, b + 36], fill=col, outline=shade(col, 0.5), width=4)
                for k in (18, 54):
                    d.ellipse([a + k - 10, b + 8, a + k + 10, b + 28], fill=shade(col, 1.3), outline=shade(col, 0.6), width=3)
        c.image.paste(bricks, mask=c.mask(shapes, True))
        for points, paint, *line in shapes:
            if not line:
                ImageDraw.Draw(c.image).line(c.place(points + points[:1]), fill=INK, width=5)
        return c.image
    if value == "icon":
        c = Canvas(rng, (240, 240, 244), scale=0.29)
        ImageDraw.Draw(c.image).rounded_rectangle([14, 14, BIG - 14, BIG - 14], 52, fill=_pick(rng, (25, 115, 240), 10))
        white = [(p, WHITE if isinstance(f, float) and f > 0.65 else (25, 115, 240), *w) for p, f, *w in shapes]
        c.paint(white, WHITE, None)
        return c.image
    if value == "graffiti":
        c = Canvas(rng, (150, 70, 55))
        d = ImageDraw.Draw(c.image)
        for j in range(8):
            d.line([(0, j * 32 + phase), (BIG, j * 32 + phase)], fill=(205, 175, 160), width=4)
            for i in range(5):
                a = i * 64 + 32 * (j % 2) + phase
                d.line([(a, j * 32 + phase), (a, j * 32 + 32 + phase)], fill=(205, 175, 160), width=4)
        glow = c.mask(shapes, True)
        c.image.paste((255, 240, 0), mask=_grow(glow, 12))
        c.paint(shapes, (240, 30, 190), (20, 10, 40), 9)
        for _ in range(5):  # drips
            a, b = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.7)
            c.paint([([(a, b), (a, b + rng.uniform(0.35, 0.55))], (60, 235, 60), 0.07)], WHITE, None)
        return c.image
    if value == "futuristic":
        c = Canvas(rng, (22, 6, 48))
        d = ImageDraw.Draw(c.image)
        for k in range(-8, 9):
            d.line([(BIG / 2 + k * 14, BIG * 0.62), (BIG / 2 + k * 70, BIG)], fill=(150, 30, 190), width=4)
        for k in (0.62, 0.68, 0.77, 0.9):
            d.line([(0, BIG * k), (BIG, BIG * k)], fill=(150, 30, 190), width=4)
        m = c.mask(shapes, True)
        c.image.paste((0, 225, 255), mask=Image.eval(_grow(m, 4).filter(ImageFilter.GaussianBlur(12)), lambda v: int(v * 0.9)))
        c.paint(shapes, (55, 35, 110), (120, 255, 255), 7)
        return c.image
    if value == "3d":  # shown as "wireframe"
        c = Canvas(rng, (6, 14, 10))
        mesh = Image.new("RGB", (BIG, BIG), (6, 14, 10))
        for slope in (0.0, 0.75, -0.75):
            _lines(mesh, 30, (40, 215, 90), 4, slope=slope, offset=phase)
        c.image.paste(mesh, mask=c.mask(shapes, True))
        for points, paint, *line in shapes:
            ImageDraw.Draw(c.image).line(c.place(points + ([] if line else points[:1])), fill=(120, 255, 150), width=6)
        return c.image
    c = Canvas(rng, (225, 205, 165), scale=0.34)  # old: a faded photograph
    c.paint(shapes, own)
    tone = np.asarray(c.image.convert("L"), np.float32)[..., None] / 255
    r = np.hypot(XX - BIG / 2, YY - BIG / 2)[..., None] / BIG
    sepia = (np.array([70, 42, 18]) * (1 - tone) + np.array([235, 205, 150]) * tone) * np.clip(1.25 - 0.9 * r, 0, 1)
    image = Image.fromarray(sepia.clip(0, 255).astype(np.uint8))
    d = ImageDraw.Draw(image)
    for _ in range(4):
        a = rng.uniform(0, BIG)
        d.line([(a, 0), (a + rng.uniform(-40, 40), BIG)], fill=(240, 222, 185), width=3)
    d.rectangle([0, 0, BIG - 1, BIG - 1], outline=(245, 236, 215), width=18)
    return image


def _cloud(d, x, y, s, fill=WHITE):
    for dx, dy, r in ((-0.9, 0.1, 0.6), (0, -0.25, 0.8), (0.9, 0.1, 0.6), (0, 0.2, 0.7)):
        d.ellipse([x + (dx - r) * s, y + (dy - r) * s, x + (dx + r) * s, y + (dy + r) * s], fill=fill)


def scene(rng, value):
    """A BIG x BIG picture of a place; things stand at jittered positions left and right of the middle."""
    B = BIG
    j = lambda a: a + rng.uniform(-10, 10)
    flat = dict(beach=(120, 200, 250), desert=(252, 190, 110), glacier=(196, 226, 246), volcano=(92, 36, 44), park=(250, 205, 225),
                gym=(172, 178, 188), waterfall=(84, 128, 76), space=(12, 10, 34), cave=(44, 34, 32), seafloor=(16, 76, 150))[value]
    im = Image.new("RGB", (B, B), _pick(rng, flat, 8))
    d = ImageDraw.Draw(im)
    if value == "beach":
        d.rectangle([0, j(110), B, B], fill=(30, 110, 200))
        d.rectangle([0, j(165), B, B], fill=(245, 220, 150))
        d.ellipse([j(12), 12, 62, 62], fill=(255, 235, 60))
        x = j(218)
        d.line([(x, 190), (x + 8, 62)], fill=(130, 90, 50), width=11)
        for a in (-55, -25, 25, 55, -85, 85):
            d.line([(x + 8, 62), (x + 8 + a * 0.8, 62 + abs(a) * 0.6 - 18)], fill=(30, 150, 60), width=11)
    elif value == "desert":
        d.ellipse([j(180), 14, j(180) + 50, 64], fill=(255, 245, 170))
        d.polygon([(0, j(150)), (90, j(115)), (190, j(155)), (B, j(125)), (B, B), (0, B)], fill=(226, 160, 80))
        for x in (j(30), j(222)):
            d.line([(x, 185), (x, 80)], fill=(40, 130, 60), width=20)
            d.line([(x - 24, 100), (x - 24, 130), (x + 24, 130), (x + 24, 95)], fill=(40, 130, 60), width=13)
    elif value == "glacier":
        for x, h in ((j(30), 40), (j(110), 85), (j(215), 25)):
            d.polygon([(x - 80, 190), (x, h), (x + 80, 190)], fill=(120, 180, 225))
            d.polygon([(x - 30, h + 60), (x, h), (x + 28, h + 56), (x + 8, h + 46), (x - 8, h + 64)], fill=WHITE)
        d.polygon([(0, j(175)), (70, j(160)), (150, j(180)), (B, j(160)), (B, B), (0, B)], fill=(240, 250, 255))
        d.line([(40, 200), (90, 240), (70, 256)], fill=(120, 190, 235), width=5)
    elif value == "volcano":
        x = j(128)
        _cloud(d, x, 22, 30, (66, 60, 66))
        d.polygon([(x - 150, 215), (x - 34, 55), (x + 34, 55), (x + 150, 215)], fill=(62, 46, 46))
        d.polygon([(x - 34, 55), (x + 34, 55), (x + 18, 90), (x + 46, 215), (x + 8, 215), (x - 6, 110), (x - 40, 215), (x - 72, 215), (x - 22, 90)],
                  fill=(255, 100, 20))
        d.rectangle([0, 208, B, B], fill=(40, 28, 30))
        d.line([(0, 232), (90, 222), (170, 240), (B, 226)], fill=(255, 120, 20), width=9)
    elif value == "park":
        x, y, turn = j(66), 82, rng.uniform(0, 1)
        d.line([(x - 34, 190), (x, y), (x + 34, 190)], fill=(110, 80, 150), width=8)
        d.ellipse([x - 58, y - 58, x + 58, y + 58], outline=(110, 80, 150), width=7)
        for k in range(8):
            a = turn + k * math.pi / 4
            px, py = x + 58 * math.cos(a), y + 58 * math.sin(a)
            d.line([(x, y), (px, py)], fill=(110, 80, 150), width=3)
            d.ellipse([px - 11, py - 11, px + 11, py + 11], fill=[(240, 60, 60), (250, 200, 40), (50, 170, 230), (70, 190, 90)][k % 4])
        d.rectangle([0, 186, B, B], fill=(130, 205, 110))
        x = j(208)
        d.rectangle([x - 38, 130, x + 38, 192], fill=WHITE)
        for k in range(-38, 38, 26):
            d.rectangle([x + k, 130, x + k + 13, 192], fill=(230, 50, 60))
        d.polygon([(x - 48, 132), (x, 84), (x + 48, 132)], fill=(230, 50, 60))
    elif value == "gym":
        d.rectangle([0, j(178), B, B], fill=(196, 146, 92))
        d.rectangle([8, 18, B - 8, 60], fill=(215, 232, 242), outline=(90, 96, 110), width=5)
        for y in (j(96), j(142)):
            d.line([(6, y), (B - 6, y)], fill=(60, 62, 70), width=9)
            for x in (22, 44, 212, 234):
                d.rectangle([x - 8, y - 27, x + 8, y + 27], fill=(32, 34, 40))
        x = j(32)
        for a, b in ((x - 20, x + 4), (x + 32, x + 56)):
            d.ellipse([a, 208, b, 246], fill=(210, 50, 50))
        d.line([(x - 8, 227), (x + 44, 227)], fill=(40, 40, 46), width=9)
    elif value == "waterfall":
        d.rectangle([0, 0, B, 16], fill=(150, 205, 245))
        d.rectangle([j(70), 10, j(186), 200], fill=(200, 232, 252))
        for x in range(74, 190, 15):
            d.line([(j(x), 12), (j(x), 200)], fill=(110, 180, 240), width=6)
        for x, y in ((18, 40), (44, 110), (214, 60), (238, 130), (10, 170)):
            d.ellipse([x - 26, y - 18, x + 26, y + 18], fill=(98, 96, 96))
        d.ellipse([-30, 182, B + 30, 300], fill=(50, 140, 220))
        for x in (70, 105, 140, 175):
            _cloud(d, j(x), 196, 13)
    elif value == "space":
        for _ in range(42):
            x, y, r = rng.uniform(0, B), rng.uniform(0, B), rng.uniform(1.5, 4)
            d.ellipse([x - r, y - r, x + r, y + r], fill=WHITE)
        x, y = j(48), j(52)
        d.ellipse([x - 32, y - 32, x + 32, y + 32], fill=(235, 150, 70))
        d.line([(x - 52, y + 16), (x + 52, y - 16)], fill=(245, 220, 160), width=9)
        x, y = j(218), j(190)
        d.ellipse([x - 24, y - 24, x + 24, y + 24], fill=(90, 140, 235))
    elif value == "cave":
        d.ellipse([j(40), j(36), j(216), 240], fill=(112, 88, 74))
        for x in range(0, B + 1, 36):
            w, h = 20, rng.uniform(45, 85)
            d.polygon([(x - w, 0), (x + w, 0), (x, h)], fill=(70, 54, 48))
            d.polygon([(x - w + 18, B), (x + w + 18, B), (x + 18, B - h * 0.6)], fill=(70, 54, 48))
    else:  # seafloor
        d.rectangle([0, j(200), B, B], fill=(222, 200, 140))
        for x in (j(24), j(54), j(226)):
            d.line([(x + 11 * math.sin(k / 2), 225 - 11 * k) for k in range(12)], fill=(30, 160, 80), width=11, joint="curve")
        x = j(196)
        for a in (-26, 0, 26):
            d.line([(x, 228), (x + a, 172)], fill=(250, 100, 110), width=12)
        for _ in range(9):
            x, y, r = rng.uniform(0, B), rng.uniform(0, 170), rng.uniform(5, 10)
            d.ellipse([x - r, y - r, x + r, y + r], outline=(190, 230, 255), width=4)
    return im


def draw_background(rng, value, noun):
    c = Canvas(rng, WHITE, scale=0.3, dy=0.12)
    c.image = scene(rng, value)
    shapes, own = animal_shapes(noun)
    c.paint(shapes + face_shapes(noun), _pick(rng, own, 8), width=4)
    return c.image


def draw_action(rng, value, noun):
    sky = dict(swim=(214, 236, 250), sleep=(44, 48, 110), fly=(130, 200, 250), angry=(250, 120, 90), cry=(190, 205, 222), sing=(252, 236, 180),
               run=(206, 232, 178), read=(226, 208, 180), eat=(250, 222, 205), drink=(214, 236, 222))[value]
    c = Canvas(rng, _pick(rng, sky, 8), scale=0.37, dy=-0.06 if value == "swim" else 0.0)
    if value == "run":
        c.angle += math.radians(16)
    shapes, own = animal_shapes(noun)
    own = _pick(rng, own, 8)
    d = ImageDraw.Draw(c.image)
    j = lambda a: a + rng.uniform(-8, 8)
    if value == "fly":
        for x, y in ((j(40), j(44)), (j(214), j(214)), (j(220), j(50))):
            _cloud(d, x, y, 24)
        wing = [(-0.3, 0.3), (-0.75, -0.35), (-1.3, -0.5), (-1.2, -0.15), (-1.22, 0.1), (-1.0, 0.25), (-0.9, 0.45), (-0.6, 0.45)]
        c.paint([(wing, (255, 250, 225)), (mirror(wing), (255, 250, 225))], own)
    if value == "run":
        for y in (0.1, 0.4, 0.7):
            c.paint([([(-1.3, y), (-0.6, y)], WHITE, 0.07)], own, None)
        c.paint([([(-0.2, 0.75), (-0.65, 0.95), (-0.85, 0.75)], 0.85, 0.17), ([(0.2, 0.75), (0.55, 0.98), (0.85, 0.85)], 0.85, 0.17)], own)
        for x in (j(28), j(58)):
            _cloud(d, x, j(226), 15, (190, 160, 120))
    c.paint(shapes + face_shapes(noun, value), own, width=5)
    if value == "swim":
        top = BIG * 0.6 + rng.uniform(-8, 8)
        wave = [(x, top + 9 * math.sin(x / 16)) for x in range(0, BIG + 8, 8)]
        sea = Image.new("L", (BIG, BIG))
        ImageDraw.Draw(sea).polygon(wave + [(BIG, BIG), (0, BIG)], fill=225)
        c.image.paste((30, 120, 220), mask=sea)
        for k in (0, 34, 68):
            d.line([(x, y + k) for x, y in wave], fill=(190, 230, 255), width=6)
    elif value == "sleep":
        for x, y, s in ((0.55, -0.55, 0.16), (0.8, -0.85, 0.22)):
            c.paint([([(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)], (255, 245, 150), 0.09)], own, None)
        d.ellipse([14, 12, 62, 60], fill=(255, 245, 190))
        d.ellipse([30, 6, 72, 50], fill=c.image.getpixel((100, 4)))
        c.paint([([(-1, 0.62), (1, 0.62), (1.08, 1.1), (-1.08, 1.1)], (210, 110, 160)), ([(-1, 0.62), (1, 0.62)], WHITE, 0.12)], own)
    elif value == "sing":
        for x, y in ((-0.95, -0.5), (0.85, -0.75), (0.95, 0.1)):
            c.paint([([(x + 0.12, y), (x + 0.12, y - 0.42), (x + 0.32, y - 0.3)], INK, 0.08), (ell(x, y, 0.14, 0.1), INK)], own, None)
        c.paint([([(0.4, 0.55), (0.14, 0.14)], (60, 60, 66), 0.1), (ell(0.1, 0.1, 0.13, 0.13), (150, 150, 160))], own)
    elif value == "read":
        c.paint([([(-0.75, 0.2), (0, 0.34), (0.75, 0.2), (0.75, 0.85), (0, 0.98), (-0.75, 0.85)], (190, 40, 50)),
                 ([(-0.65, 0.16), (0, 0.3), (0, 0.9), (-0.65, 0.76)], CREAM), ([(0.65, 0.16), (0, 0.3), (0, 0.9), (0.65, 0.76)], CREAM)] + [
                 ([(s * 0.52, y), (s * 0.12, y + 0.08)], (120, 110, 110), 0.045) for s in (-1, 1) for y in (0.32, 0.46, 0.6)], own)
    elif value == "eat":
        c.paint([(ell(0, 0.42, 0.42, 0.3, 180, 360), (225, 165, 80)), (rect(-0.44, 0.4, 0.44, 0.5), (90, 180, 60)), (rect(-0.42, 0.5, 0.42, 0.62), (120, 60, 30)),
                 (ell(0, 0.62, 0.42, 0.18, 0, 180), (225, 165, 80)), (ell(0, 0.9, 0.8, 0.13), WHITE)], own)
        c.paint([([(s * 0.95, 0.2), (s * 0.95, 0.95)], (140, 140, 150), 0.09) for s in (-1, 1)], own)
    elif value == "drink":
        c.paint([([(0.02, 0.02), (0.2, 0.35), (0.22, 0.6)], (230, 50, 60), 0.07)], own, None)
        c.paint([([(-0.12, 0.32), (0.56, 0.32), (0.46, 1.0), (-0.02, 1.0)], (215, 240, 250)), ([(-0.09, 0.52), (0.53, 0.52), (0.46, 1.0), (-0.02, 1.0)], (255, 150, 30))], own)
    elif value == "cry":
        d.ellipse([j(20), 222, j(236), 262], fill=TEAR)
    elif value == "angry":
        for s in (-1, 1):
            c.paint([([(s * 0.62, -0.75), (s * 0.9, -1.0)], WHITE, 0.12), ([(s * 0.7, -0.5), (s * 1.05, -0.6)], WHITE, 0.12)], own, None)
        c.paint([([(-0.2, 0.12), (-0.1, 0.02), (0, 0.12), (0.1, 0.02), (0.2, 0.12)], (150, 0, 0), 0.07)], own, None)
    return c.image


DRAW = dict(color=draw_color, background=draw_background, style=draw_style, action=draw_action, texture=draw_texture)


def draw(rng, detail, value, noun, size=SIZE):
    """One picture of a kind: PIL RGB image, size x size px; position, size, rotation and shade differ with `rng` (random.Random).

    A class, not a template: no two calls give the same picture. Raises KeyError on a word outside the vocabulary."""
    return DRAW[detail](rng, value, noun).resize((size, size), Image.LANCZOS)
