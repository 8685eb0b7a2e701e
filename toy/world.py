"""The toy's drawn world: a grid of coloured shapes with small digits, and questions about the picture.

Everything is a pure function of a `random.Random`; nothing here reads or writes files.
"""
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {"red": (255, 90, 90), "green": (70, 210, 90), "blue": (110, 150, 255), "yellow": (250, 230, 60),
          "purple": (210, 110, 240), "gray": (180, 180, 180)}
SHAPES = ("square", "triangle", "diamond", "bar", "pillar")
GRID, CELL = 3, 28  # cells per side, pixels per cell: one cell is one visual token of Qwen2.5-VL
ZOOM = 2  # factor by which a crop is enlarged
# (row, column) of each cell; each name is one token
PLACES = {"northwest": (0, 0), "north": (0, 1), "northeast": (0, 2), "west": (1, 0), "center": (1, 1),
          "east": (1, 2), "southwest": (2, 0), "south": (2, 1), "southeast": (2, 2)}
CORNERS = {name: cell for name, cell in PLACES.items() if 1 not in cell}
# 3 x 5 dots per digit, one octal number per row, DOT pixels per dot: PIL's font differs between versions
GLYPHS = {"one": "26227", "two": "71747", "four": "55711", "five": "74717", "seven": "71122",
          "eight": "75757"}
DIGITS = tuple(GLYPHS)  # in words: one token each, as colours and shapes are
DOT = 3


@dataclass(frozen=True)
class Thing:
    """One shape in one cell (row, column from the top left)."""

    color: str
    shape: str
    digit: str
    row: int
    column: int

    @property
    def place(self) -> str:
        return next(name for name, cell in PLACES.items() if cell == (self.row, self.column))

    def caption(self, operation: str) -> str:
        """Describe the thing, first by what the question names: the colour ("zoom") or the place ("draw").

        Each word follows the word it depends on; a model this small learns that faster.
        """
        seen = f"{self.color} {self.shape}, {self.color} {self.digit}"
        return seen if operation == "zoom" else f"{self.place} {seen}"


@dataclass(frozen=True)
class Question:
    """A question about an attribute of one thing; `looked_at` is how it refers to the thing."""

    text: str
    attribute: str  # "color", "shape" or "digit"
    answer: str
    options: tuple[str, ...]
    thing: Thing
    looked_at: str
    operation: str  # "zoom" or "draw"


def make_scene(rng: random.Random) -> list[Thing]:
    """Return 4 or 5 things with distinct colours, digits and cells, two in corners, in reading order."""
    n_things = rng.randint(4, 5)
    corners = rng.sample(sorted(CORNERS.values()), 2)
    rest = [cell for cell in PLACES.values() if cell not in CORNERS.values()]
    cells = corners + rng.sample(rest, n_things - 2)
    colors, digits = rng.sample(sorted(COLORS), n_things), rng.sample(DIGITS, n_things)
    things = [Thing(color, rng.choice(SHAPES), digit, *cell)
              for color, digit, cell in zip(colors, digits, cells)]
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw_scene(things: list[Thing], boxed: Thing | None = None) -> Image.Image:
    """Return the picture, GRID * CELL pixels wide; `boxed` gets a frame around its cell (draw)."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL))
    pen = ImageDraw.Draw(image)
    for row, column in PLACES.values():
        x, y = column * CELL, row * CELL
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=backdrop(row, column))
    for thing in things:
        draw_thing(pen, thing)
    if boxed:
        x, y = boxed.column * CELL, boxed.row * CELL
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="black", width=2)
    return image


def backdrop(row: int, column: int) -> tuple[int, int, int]:
    """Return a cell's background, which shows its place: a small model is slow to use positions alone."""
    return 70 + 30 * row + 30 * column, 70 + 30 * row, 130 + 30 * row - 30 * column


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, color = thing.column * CELL, thing.row * CELL, COLORS[thing.color]
    left, top, right, bottom = x + 2, y + 2, x + CELL - 3, y + CELL - 3
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    elif thing.shape == "triangle":
        pen.polygon(((middle_x, top - 1), (left - 1, bottom), (right + 1, bottom)), fill=color)
    elif thing.shape == "diamond":
        pen.polygon(((middle_x, top - 1), (left - 1, middle_y), (middle_x, bottom + 1),
                     (right + 1, middle_y)), fill=color)
    elif thing.shape == "bar":
        pen.rectangle((left - 1, middle_y - 7, right + 1, middle_y + 8), fill=color)
    else:
        pen.rectangle((middle_x - 7, top - 1, middle_x + 8, bottom + 1), fill=color)
    for j, dots in enumerate(GLYPHS[thing.digit]):
        for i in range(3):
            if int(dots) >> (2 - i) & 1:
                dot_x, dot_y = x + CELL // 2 + DOT * (i - 1) - 2, y + CELL // 2 + DOT * (j - 2) - 1
                pen.rectangle((dot_x, dot_y, dot_x + DOT - 1, dot_y + DOT - 1), fill="black")


def zoom_in(image: Image.Image, thing: Thing) -> Image.Image:
    """Return the cell of `thing` enlarged (zoom), whatever is in it."""
    x, y = thing.column * CELL, thing.row * CELL
    return image.crop((x, y, x + CELL, y + CELL)).resize((ZOOM * CELL, ZOOM * CELL), Image.Resampling.BICUBIC)


def ask(rng: random.Random, scene: list[Thing], operation: str) -> Question:
    """Return a question about a thing of the scene: about a corner for "draw", about any thing for "zoom"."""
    corners = [thing for thing in scene if (thing.row, thing.column) in CORNERS.values()]
    return ask_about(rng, scene, rng.choice(corners if operation == "draw" else scene), operation)


# what an operation's questions ask for
ATTRIBUTES = {"zoom": ("shape", "digit"), "draw": ("shape", "digit", "color")}


def ask_about(rng: random.Random, scene: list[Thing], thing: Thing, operation: str,
              attributes: tuple[str, ...] | None = None) -> Question:
    """Return a question about `thing`; wrong options are values from elsewhere in the scene where possible.

    "zoom" names the thing by its colour, "draw" by its place; neither asks for what it names.
    """
    attribute = rng.choice(attributes or ATTRIBUTES[operation])
    looked_at = f"the {thing.color} shape" if operation == "zoom" else f"the {thing.place} shape"
    wording = {"digit": "What number is on {}?", "color": "What color is {}?",
               "shape": "What kind is {}?"}[attribute]
    answer = getattr(thing, attribute)
    options = make_options(rng, scene, attribute, answer)
    return Question(wording.format(looked_at), attribute, answer, options, thing, looked_at, operation)


def make_options(rng: random.Random, scene: list[Thing], attribute: str, answer: str) -> tuple[str, ...]:
    """Return four shuffled values, the answer among them; the wrong ones are taken from the scene first."""
    pool = {"color": tuple(COLORS), "shape": SHAPES, "digit": DIGITS}[attribute]
    near = sorted({getattr(thing, attribute) for thing in scene} - {answer})
    far = sorted(set(pool) - set(near) - {answer})
    wrong = rng.sample(near, min(3, len(near)))
    options = [answer, *wrong, *rng.sample(far, 3 - len(wrong))]
    rng.shuffle(options)
    return tuple(options)


def opening(question: Question) -> str:
    verb = "look closer at" if question.operation == "zoom" else "mark"
    return f"I {verb} {question.looked_at}."


def observation(question: Question) -> str:
    wording = {"digit": "It shows a {}.", "color": "It is {}.", "shape": "It is a {}."}
    return wording[question.attribute].format(question.answer)


def prompt_text(question: Question) -> str:
    """Return the prompt of evaluate.py for a multiple-choice item (VLMEvalKit's): training and test agree."""
    options = "\n".join(f"{letter}. {value}" for letter, value in zip("ABCD", question.options))
    return (f"Question: {question.text}\nOptions:\n{options}\n"
            "Please select the correct answer from the options above. \n")
