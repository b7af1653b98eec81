"""Digits drawn by code, as with the mouse in a paint program: strokes through a few points each.

They were written down once, without a look at what networks make of them, and are not changed.
"""

from PIL import Image, ImageDraw

# By digit: strokes, each through these points (x to the right, y down, of a square of 100).
STROKES = {
    0: [[(55, 8), (33, 18), (22, 48), (32, 82), (52, 93), (74, 78), (80, 46), (70, 16), (53, 9)]],
    1: [[(38, 24), (54, 8), (53, 50), (52, 93)]],
    2: [
        [(24, 28), (36, 11), (58, 9), (72, 25), (64, 47), (42, 70), (22, 91)],
        [(22, 91), (50, 88), (80, 91)],
    ],
    3: [
        *([(26, 17), (45, 8), (66, 14), (70, 30), (60, 44), (43, 49)],),
        *([(43, 49), (66, 55), (75, 72), (64, 89), (42, 94), (22, 85)],),
    ],
    4: [[(56, 8), (40, 36), (20, 62), (50, 61), (84, 60)], [(64, 36), (63, 66), (61, 95)]],
    5: [
        [(74, 9), (52, 9), (33, 10)],
        [(33, 10), (31, 28), (28, 47), (48, 41), (68, 50), (73, 70), (62, 88), (40, 93), (22, 84)],
    ],
    6: [
        [(66, 7), (46, 22), (31, 46), (26, 72), (38, 91), (58, 92), (71, 76), (62, 58), (44, 57)],
        [(44, 57), (30, 68)],
    ],
    7: [[(20, 13), (48, 12), (78, 10)], [(78, 10), (62, 42), (50, 68), (43, 95)]],
    8: [
        [(70, 20), (50, 8), (33, 20), (38, 38), (57, 51), (72, 70), (64, 89), (46, 93), (29, 82)],
        [(29, 82), (32, 66), (50, 51), (66, 37), (70, 20)],
    ],
    9: [
        [(70, 26), (54, 10), (34, 20), (32, 40), (50, 51), (66, 40), (71, 24)],
        [(71, 24), (70, 52), (64, 76), (56, 95)],
    ],
}
COLORS = (
    *(("black", "white"), ("white", "black"), ("navy", "ivory"), ("yellow", "#203040")),
    *(("red", "#d0d0d0"), ("#00a000", "#fff0ff")),
)


def smooth(points, steps=12):
    """Points on a Catmull-Rom curve through the given ones."""
    ends = [points[0], *points, points[-1]]
    curve = []
    for p, q, r, s in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        for t in (step / steps for step in range(steps)):
            of_p, of_q = (-(t**3) + 2 * t**2 - t) / 2, (3 * t**3 - 5 * t**2 + 2) / 2
            of_r, of_s = (-3 * t**3 + 4 * t**2 + t) / 2, (t**3 - t**2) / 2
            curve.append([of_p * p[i] + of_q * q[i] + of_r * r[i] + of_s * s[i] for i in (0, 1)])
    return [*curve, points[-1]]


def drawing(digit, chance):
    """A picture of a digit: size, pen, colors, place, slant and a trembling hand are drawn."""
    side = chance.choice((60, 150, 280, 500, 900))
    canvas = [round(side * chance.uniform(1.3, 3)) for _ in "xy"]
    place = [chance.uniform(0.1, 0.9) * (length - side) for length in canvas]
    pen = max(2, round(side * chance.uniform(0.03, 0.16)))
    slant, aspect = chance.uniform(-0.1, 0.25), chance.uniform(0.75, 1.1)
    color, background = chance.choice(COLORS)
    picture = Image.new("RGB", canvas, background)
    draw = ImageDraw.Draw(picture)
    for stroke in STROKES[digit]:
        trembling = [[c + chance.gauss(0, 1.5) for c in point] for point in stroke]
        line = [
            (
                place[0] + side * (50 + (x - 50) * aspect + slant * (50 - y)) / 100,
                place[1] + side * y / 100,
            )
            for x, y in smooth(trembling)
        ]
        draw.line(line, fill=color, width=pen, joint="curve")
        for x, y in line:
            draw.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], fill=color)
    return picture
