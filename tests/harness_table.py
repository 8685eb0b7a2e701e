"""Forty-eight replies and what VLMEvalKit, MME-RealWorld's function and our rules read in each."""
from samples import table

OPTIONS = {name: dict(zip("ABCDE", texts)) for name, texts in {
    "MAT": ("rubber", "cotton", "kevlar", "leather"), "COL": ("white", "red", "blue", "black"),
    "LR": ("left", "right"), "NUM": ("48", "49", "4", "9"), "TEN": ("1", "2", "3", "10"),
    "BIN": ("To the right of the recycle bin", "In front of the recycle bin", "Behind the recycle bin",
            "To the left of the recycle bin"),
    "SNOW": ("red", "white", "blue", "green"), "JIG": ("the second image", "the third image"),
    "RW5": ("Red", "Green", "Yellow", "White", "The image does not feature the color")}.items()}
# a line: a name of OPTIONS, gold, reply, the letters of VLMEvalKit at e8e78f0, of MME-RealWorld's function on
# bare letters and of our rules, our rule
REPLIES = [tuple(case.values()) for case in table("harness_replies")]
