"""The toy data of the miniature: CoBSAT's vocabulary as captions and as 64 x 64 pictures.

Ten objects and ten animals, each combined with ten values of one of five details (color,
background, style, action, texture): the 500 kinds of picture of CoBSAT (Zeng et al. 2024). Nothing
here is learned; `python -m miniature train` trains the small models on it. A kind is a triple of
labels (detail, value, noun); every random choice comes from the `random.Random` that is passed.

    import random
    from miniature.world import caption, draw
    draw(random.Random(0), "color", "white", "car").save("white_car.png")
    caption(random.Random(0), "color", "white", "car")   # "A picture of a white car. The car ..."
"""
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cobsat_eval import shown_word

# side of a picture in pixels
SIZE = 64

# ---------------------------------------------------------------- captions
# the words for an action and for a background in a sentence
ING = {
    "swim": "swimming", "sleep": "sleeping", "sing": "singing", "run": "running",
    "read": "reading", "fly": "flying", "eat": "eating", "drink": "drinking", "cry": "crying",
    "angry": "angry",
}
PLACE = {
    "beach": "on the beach", "desert": "in the desert", "glacier": "on a glacier",
    "volcano": "near a volcano", "park": "in an amusement park", "gym": "in a gym",
    "waterfall": "by a waterfall", "space": "in space", "cave": "in a cave",
    "seafloor": "on the seafloor",
}
# {v} value, {o} noun, {i} the action's -ing form, {p} place; `a` before a vowel becomes `an`.
# A phrase that stands twice is chosen twice as often.
NOUN_PHRASES = {
    "color": ["a {v} {o}", "a {v} {o}", "a {o} painted {v}", "a {o} in {v}", "a {o} that is {v}"],
    "background": ["a {o} {p}", "a {o} {p}", "a {o} with a {v} background",
                   "a {o} with a {v} behind it", "a {v} scene with a {o}"],
    "style": ["a {v} style {o}", "a {o} in {v} style", "a {v} {o}", "a {o} drawn in {v} style"],
    "action": ["a {i} {o}", "a {o} that is {i}", "a {i} {o}", "a {o} which is {i}"],
    "texture": ["a {v} {o}", "a {o} made of {v}", "a {o} with a {v} texture",
                "a {o} made from {v}"],
}
# whole sentences that name the noun and the value
CLAUSES = {
    "color": ["the {o} is {v}", "the color of the {o} is {v}", "the {o} has a {v} color",
              "the {o} looks {v}"],
    "background": ["the {o} is {p}", "behind the {o} is a {v}", "the {o} has a {v} background",
                   "the background of the {o} is a {v}"],
    "style": ["the {o} is in {v} style", "the style of the {o} is {v}", "the {o} has a {v} style",
              "the {o} is drawn in {v} style"],
    "action": ["the {o} is {i}", "the {o} looks like it is {i}", "you can see the {o} is {i}",
               "what the {o} does is {i}"],
    "texture": ["the {o} is made of {v}", "the texture of the {o} is {v}",
                "the {o} has a {v} texture", "the {o} is made from {v}"],
}
# openings of a description and of a prompt for a diffusion model; {n} is a noun phrase
DESCRIBE = ["{n}", "a picture of {n}", "an image of {n}", "this image shows {n}",
            "there is {n} in the picture", "the picture shows {n}", "here we see {n}",
            "we can see {n}", "this is {n}", "it is {n}"]
CREATE = ["create an image of {n}", "create an image of {n}", "create an image that shows {n}",
          "draw {n}", "generate a picture of {n}", "make a picture of {n}"]


def with_article(noun):
    """`a car`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _fill(template, detail, value, noun):
    word = ING[value] if detail == "action" else shown_word(value)
    text = template.format(v=word, i=word, o=noun, p=PLACE.get(value))
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def label(detail, value, noun):
    """CoBSAT's short name of a kind in shown words, `white car`: what the CLIP judge compares."""
    return f"{shown_word(value)} {noun}"


def noun_phrase(rng, detail, value, noun):
    """`a red car`, `a zebra that is flying`, ...: one of several paraphrases, no full stop."""
    return _fill(rng.choice(NOUN_PHRASES[detail]), detail, value, noun)


def sentence(rng, detail, value, noun, openings=None, fixed_phrase=False):
    """One sentence that names noun and value, with capital and full stop.

    openings: DESCRIBE, CREATE or a part of one; None for any sentence, CLAUSES too.
    fixed_phrase: the opening (`This image shows`) decides the paraphrase instead of chance, so
    that the next word of a begun sentence is certain.
    """
    if openings is None and rng.random() < 0.4:
        text = _fill(rng.choice(CLAUSES[detail]), detail, value, noun)
    else:
        opening = rng.choice(openings or DESCRIBE)
        phrases = NOUN_PHRASES[detail]
        if fixed_phrase:
            phrase = phrases[(DESCRIBE + CREATE).index(opening) % len(phrases)]
        else:
            phrase = rng.choice(phrases)
        text = opening.format(n=_fill(phrase, detail, value, noun))
    return text[0].upper() + text[1:] + "."


def caption(rng, detail, value, noun, create=False, sentences=None):
    """A caption of 1 to 4 sentences, each naming noun and value (7 to 45 words).

    create: begin as a prompt for a diffusion model (`Create an image of ...`).
    sentences: how many; None: at random, more often few than many.
    """
    count = sentences or rng.choice([1, 1, 1, 2, 2, 3, 4])
    first = sentence(rng, detail, value, noun, CREATE if create else DESCRIBE)
    return " ".join([first] + [sentence(rng, detail, value, noun) for _ in range(count - 1)])


# ---------------------------------------------------------------- shapes
# Unit coordinates: x to the right, y down, -1 .. 1. A shape is (points, paint) for a filled polygon
# or (points, paint, width) for a line. `paint` is an RGB tuple, or a float: the noun's own color
# times that factor. The parts with a float are what a color or a texture fills.
INK = (28, 26, 32)
WHITE = (250, 250, 250)
CREAM = (244, 236, 208)
GLASS = (170, 215, 240)
TEAR = (70, 150, 245)
WHEEL = (45, 45, 50)
HUB = (200, 200, 205)


def ellipse(cx, cy, rx, ry, start=0, end=360, n=26):
    """Points of an ellipse, or of its arc from `start` to `end` degrees (0: right, 90: below)."""
    points = []
    for i in range(n + 1):
        angle = math.radians(start + (end - start) * i / n)
        points.append((cx + rx * math.cos(angle), cy + ry * math.sin(angle)))
    return points


def rect(x0, y0, x1, y1):
    """Points of a rectangle."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def mirror(points):
    """The points on the other side of the vertical axis."""
    return [(-x, y) for x, y in points]


def _apple():
    points = []
    for i in range(36):
        a = 2 * math.pi * i / 36
        bulge = (0.12 if math.sin(a) > 0 else 0) * math.sin(a) ** 2
        r = 0.62 + 0.24 * abs(math.cos(a)) ** 0.7 + bulge
        points.append((r * math.cos(a), 0.1 + r * math.sin(a)))
    return points


def _leaf():
    right = []
    for i in range(15):
        t = i / 14
        right.append((0.56 * math.sin(math.pi * t) ** 0.8 * (1.15 - 0.5 * t), 0.65 - 1.6 * t))
    return right + mirror(right)[::-1]


OBJECT_SHAPES = {
    "leaf": [
        ([(0, 0.6), (0.06, 0.98)], (96, 70, 40), 0.1),
        (_leaf(), 1.0),
        ([(0, 0.65), (0, -0.85)], 0.6, 0.06),
        *[([(0, y), (s * 0.26, y - 0.24)], 0.6, 0.045) for y in (0.4, 0.05, -0.3)
          for s in (-1, 1)],
    ],
    "hat": [
        (ellipse(0, 0.5, 0.98, 0.24), 1.0),
        ([(-0.55, 0.52), (-0.48, -0.65), (0.48, -0.65), (0.55, 0.52)], 1.0),
        ([(-0.55, 0.5), (-0.53, 0.2), (0.53, 0.2), (0.55, 0.5)], 0.45),
        (ellipse(0, -0.65, 0.48, 0.12), 0.8),
    ],
    "cup": [
        (ellipse(0.42, 0.02, 0.34, 0.34, -80, 80), 0.85, 0.17),
        ([(-0.72, -0.55), (0.46, -0.55), (0.34, 0.75), (-0.6, 0.75)], 1.0),
        (ellipse(-0.13, -0.55, 0.59, 0.16), 0.55),
    ],
    "chair": [
        (rect(-0.46, 0.3, -0.34, 0.75), 0.6),
        (rect(0.34, 0.3, 0.46, 0.75), 0.6),
        (rect(-0.55, -0.98, 0.55, 0.05), 1.0),
        (rect(-0.3, -0.75, -0.18, -0.05), 0.6),
        (rect(-0.06, -0.75, 0.06, -0.05), 0.6),
        (rect(0.18, -0.75, 0.3, -0.05), 0.6),
        ([(-0.55, 0.05), (0.55, 0.05), (0.72, 0.38), (-0.72, 0.38)], 0.9),
        (rect(-0.7, 0.38, -0.54, 0.98), 0.8),
        (rect(0.54, 0.38, 0.7, 0.98), 0.8),
    ],
    "car": [
        ([(-1, 0.35), (-0.97, 0), (-0.62, -0.1), (-0.36, -0.55), (0.3, -0.55), (0.62, -0.1),
          (0.97, 0.03), (1, 0.35)], 1.0),
        ([(-0.47, -0.1), (-0.28, -0.43), (-0.05, -0.43), (-0.05, -0.1)], GLASS),
        ([(0.05, -0.1), (0.05, -0.43), (0.24, -0.43), (0.44, -0.1)], GLASS),
        (ellipse(-0.54, 0.38, 0.25, 0.25), WHEEL),
        (ellipse(0.54, 0.38, 0.25, 0.25), WHEEL),
        (ellipse(-0.54, 0.38, 0.1, 0.1), HUB),
        (ellipse(0.54, 0.38, 0.1, 0.1), HUB),
        (ellipse(0.9, 0.12, 0.07, 0.07), (255, 240, 140)),
    ],
    "box": [
        (rect(-0.8, -0.22, 0.35, 0.85), 1.0),
        ([(-0.8, -0.22), (-0.38, -0.68), (0.8, -0.68), (0.35, -0.22)], 1.15),
        ([(0.35, -0.22), (0.8, -0.68), (0.8, 0.38), (0.35, 0.85)], 0.7),
        ([(-0.34, 0.2), (-0.34, -0.22), (0.1, -0.68), (0.3, -0.68), (-0.12, -0.22), (-0.12, 0.2)],
         0.55),
    ],
    "book": [
        ([(0.55, -0.9), (0.68, -0.76), (0.68, 0.92), (-0.5, 0.92), (-0.6, 0.78), (0.55, 0.78)],
         CREAM),
        (rect(-0.62, -0.9, 0.56, 0.78), 1.0),
        (rect(-0.62, -0.9, -0.42, 0.78), 0.6),
        (rect(-0.22, -0.62, 0.4, -0.3), CREAM),
        ([(-0.1, -0.46), (0.28, -0.46)], INK, 0.06),
        ([(-0.15, 0.35), (0.32, 0.35)], 0.55, 0.07),
    ],
    "ball": [
        (ellipse(0, 0, 0.88, 0.88), 1.0),
        ([(0, -0.88), (0, 0.88)], 0.5, 0.055),
        ([(-0.88, 0), (0.88, 0)], 0.5, 0.055),
        (ellipse(-0.95, 0, 0.5, 0.72, -55, 55), 0.5, 0.055),
        (ellipse(0.95, 0, 0.5, 0.72, 125, 235), 0.5, 0.055),
    ],
    "bag": [
        (ellipse(0, -0.1, 0.42, 0.72, 180, 360), 0.7, 0.14),
        ([(-0.88, 0.88), (-0.68, -0.15), (0.68, -0.15), (0.88, 0.88)], 1.0),
        ([(-0.68, -0.15), (0.68, -0.15), (0.5, 0.32), (-0.5, 0.32)], 0.75),
        (ellipse(0, 0.32, 0.1, 0.1), (240, 200, 70)),
    ],
    "apple": [
        (_apple(), 1.0),
        ([(0, -0.5), (0.08, -0.95)], (96, 64, 36), 0.1),
        ([(0.08, -0.7), (0.3, -0.95), (0.6, -0.92), (0.38, -0.68)], (90, 175, 70)),
    ],
}
OBJECT_COLOR = {
    "leaf": (75, 165, 70), "hat": (70, 80, 150), "cup": (60, 160, 170), "chair": (160, 105, 60),
    "car": (210, 60, 55), "box": (200, 160, 105), "book": (65, 110, 190), "ball": (235, 130, 50),
    "bag": (150, 75, 160), "apple": (205, 45, 50),
}
COLORS = {
    "yellow": (248, 218, 48), "white": (250, 250, 250), "red": (214, 38, 40),
    "purple": (122, 50, 165), "pink": (252, 145, 195), "orange": (246, 138, 28),
    "green": (48, 158, 66), "brown": (118, 70, 36), "blue": (44, 88, 215), "black": (36, 36, 40),
}

# Animals have a big head at (0, -0.35), seen from the front, and a small body, so that a face can
# be recognised at 64 px. Their eyes are in face_shapes, because they depend on the action.
FEET = [ellipse(-0.22, 0.9, 0.17, 0.1), ellipse(0.22, 0.9, 0.17, 0.1)]
BODY = [*[(foot, 0.85) for foot in FEET], (ellipse(0, 0.5, 0.4, 0.42), 1.0)]
FACE = (228, 184, 140)
MANE = (158, 84, 30)
SHEEP_FACE = (88, 82, 88)


def _both(points, paint):
    return [(points, paint), (mirror(points), paint)]


def _stripes(xs, y0, y1, lean=0.0):
    return [([(x, y0), (x + lean * (1 if x > 0 else -1), y1)], INK, 0.075) for x in xs]


def _ring(cx, cy, rx, ry, radius, n, paint):
    """n circles around an ellipse: wool, a mane."""
    shapes = []
    for i in range(n):
        a = 2 * math.pi * i / n
        center = (cx + rx * math.cos(a), cy + ry * math.sin(a))
        shapes.append((ellipse(*center, radius, radius), paint))
    return shapes


ANIMAL_SHAPES = {
    "zebra": [
        *BODY,
        *_stripes((-0.3, -0.1, 0.1, 0.3), 0.3, 0.75, 0.06),
        *_both([(-0.3, -0.7), (-0.42, -1), (-0.14, -0.8)], 1.0),
        (ellipse(0, -0.42, 0.37, 0.5), 1.0),
        ([(-0.14, -0.98), (0.14, -0.98), (0.07, -0.6), (-0.07, -0.6)], INK),
        *[([(s * 0.36, y), (s * 0.17, y + 0.06)], INK, 0.075) for s in (-1, 1)
          for y in (-0.62, -0.45, -0.1)],
        (ellipse(0, -0.02, 0.27, 0.2), (75, 72, 80)),
    ],
    "tiger": [
        *BODY,
        *[([(s * 0.39, y), (s * 0.15, y + 0.04)], INK, 0.075) for s in (-1, 1)
          for y in (0.4, 0.6)],
        *_both(ellipse(-0.4, -0.72, 0.17, 0.17), 1.0),
        (ellipse(0, -0.35, 0.54, 0.47), 1.0),
        *_stripes((-0.16, 0, 0.16), -0.8, -0.58),
        *[([(s * 0.53, y), (s * 0.32, y + 0.02)], INK, 0.075) for s in (-1, 1)
          for y in (-0.32, -0.14)],
        (ellipse(0, -0.12, 0.23, 0.17), WHITE),
        (ellipse(0, -0.2, 0.09, 0.06), (225, 110, 120)),
    ],
    "sheep": [
        *[(foot, (70, 66, 72)) for foot in FEET],
        *_ring(0, 0.45, 0.3, 0.22, 0.24, 8, 1.0),
        (ellipse(0, 0.45, 0.34, 0.28), 1.0),
        *_ring(0, -0.42, 0.4, 0.34, 0.2, 10, 1.0),
        *_both(ellipse(-0.45, -0.28, 0.2, 0.1), SHEEP_FACE),
        (ellipse(0, -0.24, 0.29, 0.36), SHEEP_FACE),
        *_ring(0, -0.62, 0.16, 0.04, 0.15, 3, 1.0),
    ],
    "pig": [
        *BODY,
        *_both([(-0.5, -0.55), (-0.5, -0.95), (-0.16, -0.74)], 0.85),
        (ellipse(0, -0.33, 0.53, 0.46), 1.0),
        (ellipse(0, -0.18, 0.25, 0.18), 0.78),
        *_both(ellipse(-0.09, -0.18, 0.04, 0.07), (130, 50, 70)),
    ],
    "monkey": [
        (ellipse(0.5, 0.45, 0.28, 0.3, 90, -120), 1.0, 0.1),
        *BODY,
        (ellipse(0, 0.55, 0.24, 0.26), FACE),
        *_both(ellipse(-0.54, -0.35, 0.21, 0.22), 1.0),
        *_both(ellipse(-0.54, -0.35, 0.12, 0.13), FACE),
        (ellipse(0, -0.4, 0.47, 0.47), 1.0),
        (ellipse(-0.16, -0.42, 0.2, 0.2), FACE),
        (ellipse(0.16, -0.42, 0.2, 0.2), FACE),
        (ellipse(0, -0.16, 0.34, 0.22), FACE),
        (ellipse(0, -0.24, 0.06, 0.04), INK),
    ],
    "lion": [
        ([(0.3, 0.7), (0.68, 0.5), (0.75, 0.2)], 1.0, 0.08),
        (ellipse(0.76, 0.15, 0.12, 0.14), (150, 80, 30)),
        *BODY,
        *_ring(0, -0.35, 0.5, 0.46, 0.22, 11, MANE),
        (ellipse(0, -0.35, 0.55, 0.52), MANE),
        (ellipse(0, -0.33, 0.4, 0.38), 1.0),
        (ellipse(0, -0.14, 0.19, 0.14), WHITE),
        (ellipse(0, -0.21, 0.1, 0.06), INK),
    ],
    "dog": [
        ([(0.3, 0.6), (0.66, 0.25)], 1.0, 0.12),
        *BODY,
        (ellipse(0, -0.38, 0.46, 0.46), 1.0),
        (ellipse(-0.18, -0.45, 0.17, 0.2), 0.6),
        *_both(ellipse(-0.5, -0.32, 0.16, 0.42), 0.5),
        (ellipse(0, 0.02, 0.09, 0.16), (235, 95, 110)),
        (ellipse(0, -0.16, 0.25, 0.2), WHITE),
        (ellipse(0, -0.26, 0.13, 0.09), INK),
    ],
    "cow": [
        *BODY,
        (ellipse(-0.18, 0.42, 0.15, 0.16), INK),
        (ellipse(0.2, 0.66, 0.14, 0.12), INK),
        *_both(ellipse(-0.55, -0.5, 0.2, 0.11), INK),
        *_both([(-0.2, -0.75), (-0.42, -1.02), (-0.36, -0.68)], (226, 208, 160)),
        (ellipse(0, -0.38, 0.42, 0.48), 1.0),
        (ellipse(0.2, -0.58, 0.21, 0.24), INK),
        (ellipse(0, -0.05, 0.36, 0.22), (246, 170, 175)),
        *_both(ellipse(-0.14, -0.05, 0.05, 0.06), (140, 70, 80)),
    ],
    "cat": [
        ([(0.3, 0.75), (0.66, 0.7), (0.7, 0.3), (0.6, 0.1)], 1.0, 0.11),
        *BODY,
        *_both([(-0.5, -0.4), (-0.48, -1.02), (-0.1, -0.74)], 1.0),
        *_both([(-0.42, -0.6), (-0.42, -0.86), (-0.24, -0.74)], (250, 170, 180)),
        (ellipse(0, -0.35, 0.51, 0.44), 1.0),
        (ellipse(0, -0.14, 0.2, 0.13), WHITE),
        ([(-0.07, -0.22), (0.07, -0.22), (0, -0.14)], (240, 110, 130)),
        *[([(s * 0.22, -0.14), (s * 0.66, y)], WHITE, 0.035) for s in (-1, 1)
          for y in (-0.22, -0.06)],
    ],
    "bird": [
        *[([(s * 0.2, 0.6), (s * 0.22, 0.92)], (240, 150, 40), 0.09) for s in (-1, 1)],
        *_both([(-0.5, -0.1), (-0.92, 0.3), (-0.5, 0.45)], 0.7),
        ([(-0.05, -0.7), (-0.16, -1), (0.03, -0.82), (0.14, -1), (0.12, -0.7)], 0.7),
        (ellipse(0, -0.05, 0.6, 0.68), 1.0),
        (ellipse(0, 0.3, 0.36, 0.3), WHITE),
        ([(-0.17, -0.2), (0.17, -0.2), (0, 0.1)], (250, 175, 40)),
    ],
}
ANIMAL_COLOR = {
    "zebra": (246, 246, 246), "tiger": (242, 145, 40), "sheep": (250, 247, 238),
    "pig": (250, 168, 185), "monkey": (122, 78, 48), "lion": (245, 196, 90),
    "dog": (206, 158, 104), "cow": (250, 250, 250), "cat": (120, 128, 142), "bird": (80, 165, 235),
}
# of the right eye; the left one is its mirror image
EYES = {
    "zebra": (0.16, -0.5), "sheep": (0.11, -0.32), "bird": (0.22, -0.36), "cow": (0.19, -0.5),
    "monkey": (0.15, -0.42), "lion": (0.16, -0.4), "dog": (0.19, -0.46), "cat": (0.21, -0.4),
    "pig": (0.22, -0.46), "tiger": (0.22, -0.4),
}


def face_shapes(noun, action=None):
    """Eyes, brows, tears and mouth of an animal that does `action` (None: none of them)."""
    x, y = EYES[noun]
    shapes = []
    for s in (-1, 1):
        if action == "sleep":
            lid = ellipse(s * x, y, 0.1, 0.08, 0, 180)
            shapes.append((lid, WHITE if noun == "sheep" else INK, 0.06))
        else:
            shapes.append((ellipse(s * x, y, 0.095, 0.11), WHITE))
            shapes.append((ellipse(s * x, y + 0.01, 0.055, 0.07), INK))
        if action == "angry":
            brow = [(s * (x + 0.17), y - 0.26), (s * (x - 0.1), y - 0.08)]
            shapes.append((brow, (190, 0, 0), 0.11))
        if action == "cry":
            tear = [(s * x - 0.09, y + 0.1), (s * x + 0.09, y + 0.1),
                    (s * (x + 0.28) + 0.12, 0.95), (s * (x + 0.28) - 0.12, 0.95)]
            shapes.append((tear, TEAR))
    if action == "sing":
        shapes.append((ellipse(0, -0.02, 0.14, 0.18), (150, 20, 40)))
    return shapes


# ---------------------------------------------------------------- canvas: shapes to pixels
# everything is drawn four times as large and scaled down, for smooth edges
BIG = 4 * SIZE
YY, XX = np.mgrid[0:BIG, 0:BIG].astype(np.float32)


def shade(color, factor):
    """`color` times `factor`; a very dark color is lightened, so that lines stay visible."""
    if max(color) < 60 and factor < 1:
        return tuple(int(c + 70 * (1.2 - factor)) for c in color)
    return tuple(max(0, min(255, int(c * factor))) for c in color)


class Canvas:
    """A BIG x BIG picture with a random placement (position, size, rotation) of the unit square."""

    def __init__(self, rng, background, scale=0.4, dy=0.0):
        self.image = Image.new("RGB", (BIG, BIG), background)
        self.scale = BIG * scale * rng.uniform(0.9, 1.08)
        self.angle = math.radians(rng.uniform(-9, 9))
        self.x = BIG * (0.5 + rng.uniform(-0.05, 0.05))
        self.y = BIG * (0.5 + dy + rng.uniform(-0.05, 0.05))

    def place(self, points):
        """Unit coordinates -> pixels."""
        c = math.cos(self.angle) * self.scale
        s = math.sin(self.angle) * self.scale
        return [(self.x + c * px - s * py, self.y + s * px + c * py) for px, py in points]

    def paint(self, shapes, color, outline=INK, width=5, image=None):
        """Draws `shapes` in order, each polygon with an outline; `color` is the noun's own."""
        d = ImageDraw.Draw(image or self.image)
        for points, paint, *line in shapes:
            fill = shade(color, paint) if isinstance(paint, float) else paint
            placed = self.place(points)
            if line:
                thickness = int(line[0] * self.scale)
                if outline and line[0] >= 0.1:
                    d.line(placed, fill=outline, width=thickness + 2 * width, joint="curve")
                d.line(placed, fill=fill, width=max(2, thickness), joint="curve")
            else:
                d.polygon(placed, fill=fill)
                if outline:
                    d.line(placed + placed[:2], fill=outline, width=width, joint="curve")

    def outline(self, shapes, color, width, joint=None):
        """Draws only the outlines of the polygons among `shapes`."""
        d = ImageDraw.Draw(self.image)
        for points, _, *line in shapes:
            if not line:
                d.line(self.place(points + points[:1]), fill=color, width=width, joint=joint)

    def mask(self, shapes, everything=False):
        """L picture: 255 where the noun's own color shows (`everything`: its whole silhouette)."""
        mask = Image.new("L", (BIG, BIG))
        d = ImageDraw.Draw(mask)
        for points, paint, *line in shapes:
            value = 255 if everything or isinstance(paint, float) else 0
            placed = self.place(points)
            if line:
                d.line(placed, fill=value, width=max(2, int(line[0] * self.scale)), joint="curve")
            else:
                d.polygon(placed, fill=value)
        return mask

    def grey(self, shapes):
        """L picture of the shading factors (128: 1.0), which is laid over a texture."""
        shaded = []
        for points, paint, *line in shapes:
            level = int(min(1.6, paint) * 128) if isinstance(paint, float) else 128
            shaded.append((points, (level,) * 3, *line))
        image = Image.new("RGB", (BIG, BIG), (128, 128, 128))
        self.paint(shaded, WHITE, None, image=image)
        return image.convert("L")


def _grow(mask, px):
    """`mask` grown (px > 0) or shrunk (px < 0)."""
    # a thresholded box blur, much faster than Pillow's rank filters
    threshold = 6 if px > 0 else 249
    return mask.filter(ImageFilter.BoxBlur(abs(px))).point(lambda v: 255 * (v > threshold))


def _vary(rng, color, spread=14):
    """`color` in a random shade."""
    k = rng.uniform(-spread, spread)
    return tuple(max(0, min(255, int(c + k + rng.uniform(-6, 6)))) for c in color)


def _jitter(rng, x, spread=10):
    return x + rng.uniform(-spread, spread)


def _light_grey(rng):
    return _vary(rng, (214, 220, 226), 12)


# ---------------------------------------------------------------- color and texture
def draw_color(rng, value, noun):
    canvas = Canvas(rng, _light_grey(rng))
    canvas.paint(OBJECT_SHAPES[noun], _vary(rng, COLORS[value], 10))
    return canvas.image


def _mix(a, b, t):
    """Picture between the colors a (where t is 0) and b (where t is 1); t (BIG, BIG)."""
    t = np.clip(t, 0, 1)[..., None]
    mixed = np.array(a, np.float32) * (1 - t) + np.array(b, np.float32) * t
    return Image.fromarray(mixed.astype(np.uint8))


def texture(rng, value):
    """A BIG x BIG RGB picture of a material."""
    # random phases of the pattern
    p = rng.uniform(0, 100)
    q = rng.uniform(0, 100)
    x, y = XX + p, YY + q
    if value == "wood":
        grain = 0.5 + 0.5 * np.sin((y + 14 * np.sin(x / 40)) / 5.5)
        return _mix((205, 145, 80), (120, 70, 30), grain)
    if value == "wicker":
        over = ((x // 26).astype(int) + (y // 26).astype(int)) % 2
        across = np.abs(np.sin(y / 26 * math.pi)) < 0.35
        along = np.abs(np.sin(x / 26 * math.pi)) < 0.35
        return _mix((232, 196, 120), (120, 82, 36), np.where(over, across, along))
    if value == "sequined":
        r = np.hypot((x + (y // 22 % 2) * 11) % 22 - 11, y % 22 - 11)
        glints = np.random.default_rng(rng.randrange(1 << 30)).random((BIG // 22 + 6,) * 2)
        glint = glints[(y // 22).astype(int), (x // 22).astype(int)]
        return _mix((110, 10, 90), (255, 170, 240), np.where(r < 9.5, 0.25 + 0.75 * glint, 0))
    if value == "plastic":
        shine = np.exp(-(((x - p) + (y - q) - BIG * 0.78) / 17) ** 2) * 1.2
        return _mix((30, 205, 205), WHITE, shine)
    if value == "paper":
        down = x + 1.7 * y
        fold = np.minimum(np.abs(down % 90 - 45), np.abs((x - 0.8 * y) % 110 - 55))
        return _mix((252, 252, 248), (175, 178, 190), 0.9 * (fold < 3) + 0.25 * ((down // 90) % 2))
    if value == "metal":
        return _mix((95, 102, 115), (245, 248, 252), 0.5 + 0.5 * np.sin((x - y) / 22))
    if value == "leather":
        noise = np.random.default_rng(rng.randrange(1 << 30)).random((BIG // 8, BIG // 8))
        return _mix((92, 48, 24), (58, 28, 12), noise.repeat(8, 0).repeat(8, 1))
    if value == "lace":
        r = np.hypot(x % 34 - 17, y % 34 - 17)
        return _mix((255, 250, 252), (210, 120, 150), (r < 8) | (np.abs(r - 13) < 1.6))
    if value == "denim":
        return _mix((40, 72, 132), (120, 158, 208), 0.5 + 0.5 * np.sin((x + y) / 4.2))
    # ceramic: blue flowers on white
    dx, dy = x % 64 - 32, y % 64 - 32
    petal = np.hypot(dx, dy) - 9 * np.cos(5 * np.arctan2(dy, dx))
    return _mix((248, 250, 255), (30, 70, 190), (petal < 15) & (petal > -4))


def draw_texture(rng, value, noun):
    shapes = OBJECT_SHAPES[noun]
    # the pale materials stand out better against a darker ground
    pale = value in ("paper", "ceramic", "lace")
    canvas = Canvas(rng, _vary(rng, (168, 176, 160), 10) if pale else _light_grey(rng))
    canvas.paint(shapes, WHITE)
    own = canvas.mask(shapes)
    grey = np.asarray(canvas.grey(shapes), np.float32) / 128
    filled = np.asarray(texture(rng, value), np.float32) * (0.35 + 0.65 * grey)[..., None]
    filled = filled * rng.uniform(0.93, 1.05)
    canvas.image.paste(Image.fromarray(filled.clip(0, 255).astype(np.uint8)), mask=own)
    # outlines again, over the filling
    canvas.outline(shapes, INK, 5, "curve")
    if value in ("leather", "denim"):
        inner = np.asarray(_grow(own, -8), bool) & ~np.asarray(_grow(own, -11), bool)
        seam = inner & (((XX + YY) // 9) % 2 == 0)
        thread = (250, 225, 160) if value == "leather" else (245, 160, 60)
        canvas.image.paste(thread, mask=Image.fromarray(seam.astype(np.uint8) * 255))
    return canvas.image


# ---------------------------------------------------------------- style
def _lines(image, step, color, width, slope=1, offset=0):
    d = ImageDraw.Draw(image)
    for k in range(-BIG * 2, BIG * 3, step):
        d.line([(k + offset, 0), (k + offset + slope * BIG, BIG)], fill=color, width=width)


def _watercolor(rng, shapes, own, phase):
    canvas = Canvas(rng, (253, 251, 244))
    pale = tuple((x + 255) // 2 for x in _vary(rng, own, 20))
    canvas.paint(shapes, pale, None)
    wash = np.random.default_rng(rng.randrange(1 << 30)).random((8, 8)) * 110
    blot = Image.fromarray(wash.astype(np.uint8)).resize((BIG, BIG), Image.BICUBIC)
    spread = canvas.mask(shapes, True).filter(ImageFilter.GaussianBlur(13))
    base = canvas.image.filter(ImageFilter.GaussianBlur(6))
    base.paste(pale, mask=Image.eval(spread, lambda v: v // 2))
    return Image.composite(Image.new("RGB", (BIG, BIG), (255, 255, 255)), base, blot)


def _sketch(rng, shapes, own, phase):
    canvas = Canvas(rng, (246, 244, 238))
    hatch = Image.new("RGB", (BIG, BIG), (246, 244, 238))
    _lines(hatch, 15, (120, 118, 118), 3, slope=-1, offset=phase)
    canvas.image.paste(hatch, mask=canvas.mask(shapes))
    d = ImageDraw.Draw(canvas.image)
    for points, _, *line in shapes:
        # each outline twice, each time by another shaky hand
        for _ in range(2):
            shaky = [(_jitter(rng, px, 0.02), _jitter(rng, py, 0.02)) for px, py in points]
            closed = shaky if line else shaky + shaky[:1]
            d.line(canvas.place(closed), fill=(70, 68, 70), width=4)
    return canvas.image


def _pixel(rng, shapes, own, phase):
    canvas = Canvas(rng, (92, 200, 120))
    canvas.paint(shapes, own, INK, 12)
    return canvas.image.resize((13, 13), Image.BOX).resize((BIG, BIG), Image.NEAREST)


def _origami(rng, shapes, own, phase):
    canvas = Canvas(rng, (240, 226, 200))
    facets = Image.new("RGB", (BIG, BIG))
    d = ImageDraw.Draw(facets)
    paper = _vary(rng, (240, 90, 130), 10)
    for i in range(-1, 5):
        for j in range(-1, 5):
            a, b = i * 64 + phase, j * 64 + phase
            upper = shade(paper, 0.62 + 0.13 * ((i + 2 * j) % 4))
            lower = shade(paper, 0.7 + 0.13 * ((2 * i + j) % 3))
            d.polygon([(a, b), (a + 64, b), (a, b + 64)], fill=upper)
            d.polygon([(a + 64, b + 64), (a + 64, b), (a, b + 64)], fill=lower)
    _lines(facets, 64, WHITE, 3, slope=-1, offset=2 * phase)
    canvas.image.paste(facets, mask=canvas.mask(shapes, True))
    # polygons as thin lines: the folds
    folds = [(shape[0], 0.45, 0.03) for shape in shapes if len(shape) == 2]
    canvas.paint(folds, (255, 150, 180), None)
    return canvas.image


def _lego(rng, shapes, own, phase):
    canvas = Canvas(rng, (150, 210, 245))
    bricks = Image.new("RGB", (BIG, BIG))
    d = ImageDraw.Draw(bricks)
    palette = [(225, 30, 35), (250, 205, 20), (20, 105, 200), (20, 150, 70)]
    for j in range(-1, 8):
        for i in range(-1, 5):
            x, y = i * 72 + 36 * (j % 2) + phase, j * 36 + phase
            color = palette[(i + 3 * j) % 4]
            d.rectangle([x, y, x + 72, y + 36], fill=color, outline=shade(color, 0.5), width=4)
            for k in (18, 54):
                d.ellipse([x + k - 10, y + 8, x + k + 10, y + 28], fill=shade(color, 1.3),
                          outline=shade(color, 0.6), width=3)
    canvas.image.paste(bricks, mask=canvas.mask(shapes, True))
    canvas.outline(shapes, INK, 5)
    return canvas.image


def _icon(rng, shapes, own, phase):
    canvas = Canvas(rng, (240, 240, 244), scale=0.29)
    blue = (25, 115, 240)
    d = ImageDraw.Draw(canvas.image)
    d.rounded_rectangle([14, 14, BIG - 14, BIG - 14], 52, fill=_vary(rng, blue, 10))
    two_colors = []
    for points, paint, *line in shapes:
        light = isinstance(paint, float) and paint > 0.65
        two_colors.append((points, WHITE if light else blue, *line))
    canvas.paint(two_colors, WHITE, None)
    return canvas.image


def _graffiti(rng, shapes, own, phase):
    canvas = Canvas(rng, (150, 70, 55))
    d = ImageDraw.Draw(canvas.image)
    mortar = (205, 175, 160)
    for j in range(8):
        y = j * 32 + phase
        d.line([(0, j * 32 + phase), (BIG, j * 32 + phase)], fill=mortar, width=4)
        for i in range(5):
            x = i * 64 + 32 * (j % 2) + phase
            d.line([(x, y), (x, y + 32)], fill=mortar, width=4)
    canvas.image.paste((255, 240, 0), mask=_grow(canvas.mask(shapes, True), 12))
    canvas.paint(shapes, (240, 30, 190), (20, 10, 40), 9)
    # five drips of paint
    for _ in range(5):
        x, y = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.7)
        drip = [(x, y), (x, y + rng.uniform(0.35, 0.55))]
        canvas.paint([(drip, (60, 235, 60), 0.07)], WHITE, None)
    return canvas.image


def _futuristic(rng, shapes, own, phase):
    canvas = Canvas(rng, (22, 6, 48))
    d = ImageDraw.Draw(canvas.image)
    grid = (150, 30, 190)
    for k in range(-8, 9):
        d.line([(BIG / 2 + k * 14, BIG * 0.62), (BIG / 2 + k * 70, BIG)], fill=grid, width=4)
    for k in (0.62, 0.68, 0.77, 0.9):
        d.line([(0, BIG * k), (BIG, BIG * k)], fill=grid, width=4)
    glow = _grow(canvas.mask(shapes, True), 4).filter(ImageFilter.GaussianBlur(12))
    canvas.image.paste((0, 225, 255), mask=Image.eval(glow, lambda v: int(v * 0.9)))
    canvas.paint(shapes, (55, 35, 110), (120, 255, 255), 7)
    return canvas.image


def _wireframe(rng, shapes, own, phase):
    canvas = Canvas(rng, (6, 14, 10))
    mesh = Image.new("RGB", (BIG, BIG), (6, 14, 10))
    for slope in (0.0, 0.75, -0.75):
        _lines(mesh, 30, (40, 215, 90), 4, slope=slope, offset=phase)
    canvas.image.paste(mesh, mask=canvas.mask(shapes, True))
    d = ImageDraw.Draw(canvas.image)
    for points, _, *line in shapes:
        closed = points if line else points + points[:1]
        d.line(canvas.place(closed), fill=(120, 255, 150), width=6)
    return canvas.image


def _old(rng, shapes, own, phase):
    # a faded photograph
    canvas = Canvas(rng, (225, 205, 165), scale=0.34)
    canvas.paint(shapes, own)
    tone = np.asarray(canvas.image.convert("L"), np.float32)[..., None] / 255
    r = np.hypot(XX - BIG / 2, YY - BIG / 2)[..., None] / BIG
    sepia = np.array([70, 42, 18]) * (1 - tone) + np.array([235, 205, 150]) * tone
    sepia = sepia * np.clip(1.25 - 0.9 * r, 0, 1)
    image = Image.fromarray(sepia.clip(0, 255).astype(np.uint8))
    d = ImageDraw.Draw(image)
    for _ in range(4):
        x = rng.uniform(0, BIG)
        d.line([(x, 0), (_jitter(rng, x, 40), BIG)], fill=(240, 222, 185), width=3)
    d.rectangle([0, 0, BIG - 1, BIG - 1], outline=(245, 236, 215), width=18)
    return image


STYLES = {
    "watercolor": _watercolor, "sketch": _sketch, "pixel": _pixel, "origami": _origami,
    "lego": _lego, "icon": _icon, "graffiti": _graffiti, "futuristic": _futuristic,
    "3d": _wireframe, "old": _old,
}


def draw_style(rng, value, noun):
    phase = rng.randrange(20)
    return STYLES[value](rng, OBJECT_SHAPES[noun], OBJECT_COLOR[noun], phase)


# ---------------------------------------------------------------- background
def _cloud(d, x, y, size, fill=WHITE):
    for dx, dy, r in ((-0.9, 0.1, 0.6), (0, -0.25, 0.8), (0.9, 0.1, 0.6), (0, 0.2, 0.7)):
        left, right = x + (dx - r) * size, x + (dx + r) * size
        d.ellipse([left, y + (dy - r) * size, right, y + (dy + r) * size], fill=fill)


def _beach(rng, d):
    d.rectangle([0, _jitter(rng, 110), BIG, BIG], fill=(30, 110, 200))
    d.rectangle([0, _jitter(rng, 165), BIG, BIG], fill=(245, 220, 150))
    d.ellipse([_jitter(rng, 12), 12, 62, 62], fill=(255, 235, 60))
    x = _jitter(rng, 218)
    d.line([(x, 190), (x + 8, 62)], fill=(130, 90, 50), width=11)
    for a in (-55, -25, 25, 55, -85, 85):
        leaf = [(x + 8, 62), (x + 8 + a * 0.8, 62 + abs(a) * 0.6 - 18)]
        d.line(leaf, fill=(30, 150, 60), width=11)


def _desert(rng, d):
    d.ellipse([_jitter(rng, 180), 14, _jitter(rng, 180) + 50, 64], fill=(255, 245, 170))
    dunes = [(0, _jitter(rng, 150)), (90, _jitter(rng, 115)), (190, _jitter(rng, 155)),
             (BIG, _jitter(rng, 125)), (BIG, BIG), (0, BIG)]
    d.polygon(dunes, fill=(226, 160, 80))
    green = (40, 130, 60)
    for x in (_jitter(rng, 30), _jitter(rng, 222)):
        d.line([(x, 185), (x, 80)], fill=green, width=20)
        d.line([(x - 24, 100), (x - 24, 130), (x + 24, 130), (x + 24, 95)], fill=green, width=13)


def _glacier(rng, d):
    for x, h in ((_jitter(rng, 30), 40), (_jitter(rng, 110), 85), (_jitter(rng, 215), 25)):
        d.polygon([(x - 80, 190), (x, h), (x + 80, 190)], fill=(120, 180, 225))
        snow = [(x - 30, h + 60), (x, h), (x + 28, h + 56), (x + 8, h + 46), (x - 8, h + 64)]
        d.polygon(snow, fill=WHITE)
    ice = [(0, _jitter(rng, 175)), (70, _jitter(rng, 160)), (150, _jitter(rng, 180)),
           (BIG, _jitter(rng, 160)), (BIG, BIG), (0, BIG)]
    d.polygon(ice, fill=(240, 250, 255))
    d.line([(40, 200), (90, 240), (70, 256)], fill=(120, 190, 235), width=5)


def _volcano(rng, d):
    x = _jitter(rng, 128)
    _cloud(d, x, 22, 30, (66, 60, 66))
    cone = [(x - 150, 215), (x - 34, 55), (x + 34, 55), (x + 150, 215)]
    d.polygon(cone, fill=(62, 46, 46))
    lava = [(x - 34, 55), (x + 34, 55), (x + 18, 90), (x + 46, 215), (x + 8, 215), (x - 6, 110),
            (x - 40, 215), (x - 72, 215), (x - 22, 90)]
    d.polygon(lava, fill=(255, 100, 20))
    d.rectangle([0, 208, BIG, BIG], fill=(40, 28, 30))
    d.line([(0, 232), (90, 222), (170, 240), (BIG, 226)], fill=(255, 120, 20), width=9)


def _park(rng, d):
    # a Ferris wheel
    x, y = _jitter(rng, 66), 82
    turn = rng.uniform(0, 1)
    steel = (110, 80, 150)
    cabins = [(240, 60, 60), (250, 200, 40), (50, 170, 230), (70, 190, 90)]
    d.line([(x - 34, 190), (x, y), (x + 34, 190)], fill=steel, width=8)
    d.ellipse([x - 58, y - 58, x + 58, y + 58], outline=steel, width=7)
    for k in range(8):
        a = turn + k * math.pi / 4
        px, py = x + 58 * math.cos(a), y + 58 * math.sin(a)
        d.line([(x, y), (px, py)], fill=steel, width=3)
        d.ellipse([px - 11, py - 11, px + 11, py + 11], fill=cabins[k % 4])
    d.rectangle([0, 186, BIG, BIG], fill=(130, 205, 110))
    # a tent
    x = _jitter(rng, 208)
    d.rectangle([x - 38, 130, x + 38, 192], fill=WHITE)
    for k in range(-38, 38, 26):
        d.rectangle([x + k, 130, x + k + 13, 192], fill=(230, 50, 60))
    d.polygon([(x - 48, 132), (x, 84), (x + 48, 132)], fill=(230, 50, 60))


def _gym(rng, d):
    d.rectangle([0, _jitter(rng, 178), BIG, BIG], fill=(196, 146, 92))
    d.rectangle([8, 18, BIG - 8, 60], fill=(215, 232, 242), outline=(90, 96, 110), width=5)
    for y in (_jitter(rng, 96), _jitter(rng, 142)):
        d.line([(6, y), (BIG - 6, y)], fill=(60, 62, 70), width=9)
        for x in (22, 44, 212, 234):
            d.rectangle([x - 8, y - 27, x + 8, y + 27], fill=(32, 34, 40))
    x = _jitter(rng, 32)
    for left, right in ((x - 20, x + 4), (x + 32, x + 56)):
        d.ellipse([left, 208, right, 246], fill=(210, 50, 50))
    d.line([(x - 8, 227), (x + 44, 227)], fill=(40, 40, 46), width=9)


def _waterfall(rng, d):
    d.rectangle([0, 0, BIG, 16], fill=(150, 205, 245))
    d.rectangle([_jitter(rng, 70), 10, _jitter(rng, 186), 200], fill=(200, 232, 252))
    for x in range(74, 190, 15):
        d.line([(_jitter(rng, x), 12), (_jitter(rng, x), 200)], fill=(110, 180, 240), width=6)
    for x, y in ((18, 40), (44, 110), (214, 60), (238, 130), (10, 170)):
        d.ellipse([x - 26, y - 18, x + 26, y + 18], fill=(98, 96, 96))
    d.ellipse([-30, 182, BIG + 30, 300], fill=(50, 140, 220))
    for x in (70, 105, 140, 175):
        _cloud(d, _jitter(rng, x), 196, 13)


def _space(rng, d):
    for _ in range(42):
        x, y, r = rng.uniform(0, BIG), rng.uniform(0, BIG), rng.uniform(1.5, 4)
        d.ellipse([x - r, y - r, x + r, y + r], fill=WHITE)
    x, y = _jitter(rng, 48), _jitter(rng, 52)
    d.ellipse([x - 32, y - 32, x + 32, y + 32], fill=(235, 150, 70))
    d.line([(x - 52, y + 16), (x + 52, y - 16)], fill=(245, 220, 160), width=9)
    x, y = _jitter(rng, 218), _jitter(rng, 190)
    d.ellipse([x - 24, y - 24, x + 24, y + 24], fill=(90, 140, 235))


def _cave(rng, d):
    opening = [_jitter(rng, 40), _jitter(rng, 36), _jitter(rng, 216), 240]
    d.ellipse(opening, fill=(112, 88, 74))
    rock = (70, 54, 48)
    for x in range(0, BIG + 1, 36):
        h = rng.uniform(45, 85)
        d.polygon([(x - 20, 0), (x + 20, 0), (x, h)], fill=rock)
        d.polygon([(x - 2, BIG), (x + 38, BIG), (x + 18, BIG - h * 0.6)], fill=rock)


def _seafloor(rng, d):
    d.rectangle([0, _jitter(rng, 200), BIG, BIG], fill=(222, 200, 140))
    for x in (_jitter(rng, 24), _jitter(rng, 54), _jitter(rng, 226)):
        weed = [(x + 11 * math.sin(k / 2), 225 - 11 * k) for k in range(12)]
        d.line(weed, fill=(30, 160, 80), width=11, joint="curve")
    x = _jitter(rng, 196)
    for a in (-26, 0, 26):
        d.line([(x, 228), (x + a, 172)], fill=(250, 100, 110), width=12)
    for _ in range(9):
        x, y, r = rng.uniform(0, BIG), rng.uniform(0, 170), rng.uniform(5, 10)
        d.ellipse([x - r, y - r, x + r, y + r], outline=(190, 230, 255), width=4)


# name: (color of the sky or the walls, what is drawn on it)
BACKGROUNDS = {
    "beach": ((120, 200, 250), _beach), "desert": ((252, 190, 110), _desert),
    "glacier": ((196, 226, 246), _glacier), "volcano": ((92, 36, 44), _volcano),
    "park": ((250, 205, 225), _park), "gym": ((172, 178, 188), _gym),
    "waterfall": ((84, 128, 76), _waterfall), "space": ((12, 10, 34), _space),
    "cave": ((44, 34, 32), _cave), "seafloor": ((16, 76, 150), _seafloor),
}


def draw_background(rng, value, noun):
    canvas = Canvas(rng, WHITE, scale=0.3, dy=0.12)
    color, paint_scene = BACKGROUNDS[value]
    canvas.image = Image.new("RGB", (BIG, BIG), _vary(rng, color, 8))
    paint_scene(rng, ImageDraw.Draw(canvas.image))
    own = _vary(rng, ANIMAL_COLOR[noun], 8)
    canvas.paint(ANIMAL_SHAPES[noun] + face_shapes(noun), own, width=4)
    return canvas.image


# ---------------------------------------------------------------- action
SKY = {
    "swim": (214, 236, 250), "sleep": (44, 48, 110), "fly": (130, 200, 250),
    "angry": (250, 120, 90), "cry": (190, 205, 222), "sing": (252, 236, 180),
    "run": (206, 232, 178), "read": (226, 208, 180), "eat": (250, 222, 205),
    "drink": (214, 236, 222),
}


def _wings(rng, canvas, own):
    d = ImageDraw.Draw(canvas.image)
    centers = [(_jitter(rng, x, 8), _jitter(rng, y, 8)) for x, y in
               ((40, 44), (214, 214), (220, 50))]
    for x, y in centers:
        _cloud(d, x, y, 24)
    wing = [(-0.3, 0.3), (-0.75, -0.35), (-1.3, -0.5), (-1.2, -0.15), (-1.22, 0.1), (-1.0, 0.25),
            (-0.9, 0.45), (-0.6, 0.45)]
    canvas.paint(_both(wing, (255, 250, 225)), own)


def _running_legs(rng, canvas, own):
    for y in (0.1, 0.4, 0.7):
        canvas.paint([([(-1.3, y), (-0.6, y)], WHITE, 0.07)], own, None)
    legs = [([(-0.2, 0.75), (-0.65, 0.95), (-0.85, 0.75)], 0.85, 0.17),
            ([(0.2, 0.75), (0.55, 0.98), (0.85, 0.85)], 0.85, 0.17)]
    canvas.paint(legs, own)
    d = ImageDraw.Draw(canvas.image)
    for x in (_jitter(rng, 28, 8), _jitter(rng, 58, 8)):
        _cloud(d, x, _jitter(rng, 226, 8), 15, (190, 160, 120))


def _swim(rng, canvas, own):
    top = BIG * 0.6 + rng.uniform(-8, 8)
    wave = [(x, top + 9 * math.sin(x / 16)) for x in range(0, BIG + 8, 8)]
    sea = Image.new("L", (BIG, BIG))
    ImageDraw.Draw(sea).polygon(wave + [(BIG, BIG), (0, BIG)], fill=225)
    canvas.image.paste((30, 120, 220), mask=sea)
    d = ImageDraw.Draw(canvas.image)
    for k in (0, 34, 68):
        d.line([(x, y + k) for x, y in wave], fill=(190, 230, 255), width=6)


def _sleep(rng, canvas, own):
    for x, y, s in ((0.55, -0.55, 0.16), (0.8, -0.85, 0.22)):
        letter_z = [(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)]
        canvas.paint([(letter_z, (255, 245, 150), 0.09)], own, None)
    # the moon
    d = ImageDraw.Draw(canvas.image)
    d.ellipse([14, 12, 62, 60], fill=(255, 245, 190))
    d.ellipse([30, 6, 72, 50], fill=canvas.image.getpixel((100, 4)))
    blanket = [(-1, 0.62), (1, 0.62), (1.08, 1.1), (-1.08, 1.1)]
    hem = [(-1, 0.62), (1, 0.62)]
    canvas.paint([(blanket, (210, 110, 160)), (hem, WHITE, 0.12)], own)


def _sing(rng, canvas, own):
    for x, y in ((-0.95, -0.5), (0.85, -0.75), (0.95, 0.1)):
        stem = [(x + 0.12, y), (x + 0.12, y - 0.42), (x + 0.32, y - 0.3)]
        canvas.paint([(stem, INK, 0.08), (ellipse(x, y, 0.14, 0.1), INK)], own, None)
    microphone = [([(0.4, 0.55), (0.14, 0.14)], (60, 60, 66), 0.1),
                  (ellipse(0.1, 0.1, 0.13, 0.13), (150, 150, 160))]
    canvas.paint(microphone, own)


def _read(rng, canvas, own):
    cover = [(-0.75, 0.2), (0, 0.34), (0.75, 0.2), (0.75, 0.85), (0, 0.98), (-0.75, 0.85)]
    left_page = [(-0.65, 0.16), (0, 0.3), (0, 0.9), (-0.65, 0.76)]
    right_page = [(0.65, 0.16), (0, 0.3), (0, 0.9), (0.65, 0.76)]
    text = [([(s * 0.52, y), (s * 0.12, y + 0.08)], (120, 110, 110), 0.045) for s in (-1, 1)
            for y in (0.32, 0.46, 0.6)]
    canvas.paint([(cover, (190, 40, 50)), (left_page, CREAM), (right_page, CREAM), *text], own)


def _eat(rng, canvas, own):
    bun = (225, 165, 80)
    burger = [(ellipse(0, 0.42, 0.42, 0.3, 180, 360), bun),
              (rect(-0.44, 0.4, 0.44, 0.5), (90, 180, 60)),
              (rect(-0.42, 0.5, 0.42, 0.62), (120, 60, 30)),
              (ellipse(0, 0.62, 0.42, 0.18, 0, 180), bun),
              (ellipse(0, 0.9, 0.8, 0.13), WHITE)]
    canvas.paint(burger, own)
    cutlery = [([(s * 0.95, 0.2), (s * 0.95, 0.95)], (140, 140, 150), 0.09) for s in (-1, 1)]
    canvas.paint(cutlery, own)


def _drink(rng, canvas, own):
    straw = [(0.02, 0.02), (0.2, 0.35), (0.22, 0.6)]
    glass = [(-0.12, 0.32), (0.56, 0.32), (0.46, 1.0), (-0.02, 1.0)]
    juice = [(-0.09, 0.52), (0.53, 0.52), (0.46, 1.0), (-0.02, 1.0)]
    canvas.paint([(straw, (230, 50, 60), 0.07)], own, None)
    canvas.paint([(glass, (215, 240, 250)), (juice, (255, 150, 30))], own)


def _cry(rng, canvas, own):
    puddle = [_jitter(rng, 20, 8), 222, _jitter(rng, 236, 8), 262]
    ImageDraw.Draw(canvas.image).ellipse(puddle, fill=TEAR)


def _angry(rng, canvas, own):
    for s in (-1, 1):
        steam = [([(s * 0.62, -0.75), (s * 0.9, -1.0)], WHITE, 0.12),
                 ([(s * 0.7, -0.5), (s * 1.05, -0.6)], WHITE, 0.12)]
        canvas.paint(steam, own, None)
    mouth = [(-0.2, 0.12), (-0.1, 0.02), (0, 0.12), (0.1, 0.02), (0.2, 0.12)]
    canvas.paint([(mouth, (150, 0, 0), 0.07)], own, None)


# what is drawn before the animal, and what over it
BEHIND = {"fly": _wings, "run": _running_legs}
IN_FRONT = {
    "swim": _swim, "sleep": _sleep, "sing": _sing, "read": _read, "eat": _eat, "drink": _drink,
    "cry": _cry, "angry": _angry,
}


def draw_action(rng, value, noun):
    sky = _vary(rng, SKY[value], 8)
    canvas = Canvas(rng, sky, scale=0.37, dy=-0.06 if value == "swim" else 0.0)
    if value == "run":
        canvas.angle += math.radians(16)
    own = _vary(rng, ANIMAL_COLOR[noun], 8)
    if value in BEHIND:
        BEHIND[value](rng, canvas, own)
    canvas.paint(ANIMAL_SHAPES[noun] + face_shapes(noun, value), own, width=5)
    if value in IN_FRONT:
        IN_FRONT[value](rng, canvas, own)
    return canvas.image


# ---------------------------------------------------------------- a picture of a kind
DRAW = {
    "color": draw_color, "background": draw_background, "style": draw_style,
    "action": draw_action, "texture": draw_texture,
}


def draw(rng, detail, value, noun, size=SIZE):
    """One picture of a kind: PIL RGB image, size x size px.

    Position, size, rotation and shade differ with `rng` (random.Random): a class of pictures, not
    a template. Raises KeyError on a word outside the vocabulary.
    """
    return DRAW[detail](rng, value, noun).resize((size, size), Image.LANCZOS)
