"""Forty-eight replies and what VLMEvalKit, MME-RealWorld's function and our rules read in each."""

OPTIONS = {name: dict(zip("ABCDE", texts)) for name, texts in {
    "MAT": ("rubber", "cotton", "kevlar", "leather"), "COL": ("white", "red", "blue", "black"),
    "LR": ("left", "right"), "NUM": ("48", "49", "4", "9"), "TEN": ("1", "2", "3", "10"),
    "BIN": ("To the right of the recycle bin", "In front of the recycle bin", "Behind the recycle bin",
            "To the left of the recycle bin"),
    "SNOW": ("red", "white", "blue", "green"), "JIG": ("the second image", "the third image"),
    "RW5": ("Red", "Green", "Yellow", "White", "The image does not feature the color")}.items()}
IMAGINED = ("Suppose the image had been zoomed in on the lower left region, so that the cup next to the "
            "laptop is enlarged. In this imagined view the cup shows a matte surface whose colour is clearly "
            "red.")
MARKED = "Suppose a rectangle had been drawn around the cup. A closer look shows the surface is red."
# Options, gold, reply, VLMEvalKit e8e78f0, MME-RealWorld on bare letters, ours, our rule
REPLIES = [(name, gold, reply.replace("{RA}", MARKED).replace("{R}", IMAGINED), *verdicts)
           for name, gold, reply, *verdicts in [
    ("COL", "B", "\\boxed{B}", "B", "B", "B", "boxed_letter"),
    ("COL", "B", "{R} \\boxed{B}", "B", "B", "B", "boxed_letter"),
    ("COL", "B", "{RA} \\boxed{B}", None, "A", "B", "boxed_letter"),
    ("COL", "B", "Option B says red. {R} So the answer is \\boxed{B}.", None, "B", "B", "boxed_letter"),
    ("COL", "A", "A white cup is visible in the enlarged crop of the lower left region. \\boxed{A}", None,
     "A", "A", "boxed_letter"),
    ("MAT", "C", "The correct answer is \\boxed{\\text{C}}", "C", "C", "C", "boxed_letter"),
    ("COL", "B", "The answer is \\boxed{red}.", "B", None, "B", "boxed_text"),
    ("COL", "B", "{R} \\boxed{red}", None, None, "B", "boxed_text"),
    ("COL", "C", "The answer is blue.", "B", None, "C", "bare_text_in"),
    ("COL", "D", "The answer is clearly the black one.", "C", None, "D", "tail_text"),
    ("COL", "C", "Zooming in, the answer is a deep shade: blue.", "A", None, "C", "tail_text"),
    ("COL", "C", "The answer is **blue**, matching the plate next to it.", "B", None, "C", "tail_text"),
    ("COL", "B", "Answer: B", "B", "A", "B", "phrase"),
    ("COL", "B", "**B. red**", "B", "B", "B", "bare_letter_text"),
    ("COL", "B", "B. red - the cup in the lower left corner is clearly painted red.", None, "B", "B",
     "bare_letter_text"), ("COL", "B", "(B)", "B", "B", "B", "bare_letter"),
    ("COL", "B", "b", None, "B", "B", "bare_letter"),
    ("COL", "B", "\\boxed{b}", None, None, "B", "boxed_letter"),
    ("COL", "C", "At first glance one Cannot determine the answer, but zooming in shows blue. \\boxed{C}",
     "Z", "A", "C", "boxed_letter"),
    ("COL", "C", "I'm sorry, but without the image provided I cannot answer.", "Z", None, None, "unresolved"),
    ("COL", "C", "{R}", None, None, "B", "tail_text"), ("COL", "C", "", None, "A", None, "empty"),
    ("COL", "C", "My first guess is \\boxed{A}. Wait, looking again the cup is blue, so \\boxed{C}.", None,
     "A", "C", "boxed_letter"),
    ("COL", "D", "The options are A, B, C, D. The right one is D.", None, "A", None, "unresolved"),
    ("LR", "A", "The dog is on the left side of the river. \\boxed{A}", "A", "A", "A", "boxed_letter"),
    ("LR", "A", "left", "A", None, "A", "bare_text"),
    ("LR", "A", "The dog is to the left of the river, not to the right.", None, None, None, "unresolved"),
    ("NUM", "A", "48", None, None, "A", "bare_text"), ("TEN", "D", "10", None, None, "D", "bare_text"),
    ("TEN", "C", "There are 3 people.", None, None, "C", "bare_text_in"),
    ("SNOW", "B", "The roof is covered in snow.", "A", None, None, "unresolved"),
    ("MAT", "D", "The answer is (D) leather.", "D", "D", "D", "phrase"),
    ("MAT", "C", "The final answer is: $\\boxed{C}$", "C", "C", "C", "boxed_letter"),
    ("COL", "C", "\\boxed{C. blue}", "C", "C", "C", "boxed_letter_text"),
    ("COL", "B", "A   \n\n red", "A", "A", "B", "tail_text"),
    ("MAT", "B", "<abs_vis_token>词汇 A the</abs_vis_token> The glove is made of cotton. \\boxed{B}", None, "A",
     "B", "boxed_letter"),
    ("JIG", "B", "The missing corner is completed by the third image (B).", "B", "B", "B", "bare_text_in"),
    ("RW5", "E", "E. The image does not feature the color.", "E", "E", "E", "bare_letter_text"),
    ("RW5", "E", "The answer is E, because the object in question is not visible anywhere.", None, "E", "E",
     "phrase"),
    ("RW5", "C", "Based on the image, the car is yellow. \\boxed{C}", "C", "B", "C", "boxed_letter"),
    ("COL", "B", "答案是B。", None, "B", "B", "phrase"),
    ("COL", "B", "<think>A red or blue cup? Clearly red.</think><answer>B</answer>", None, "A", "B",
     "tag_letter"), ("MAT", "B", "\\boxed{\\textbf{(B)}}", "B", "B", "B", "boxed_letter"),
    ("BIN", "C", "Zoom in on region A of the map. The person stands behind the recycle bin.\n\nTherefore, "
     "the final answer is \\boxed{C}", "C", "A", "C", "boxed_letter"),
    ("BIN", "C", "The person stands behind the recycle bin.", "C", None, "C", "bare_text_in"),
    ("COL", "D", "The answer is **not** A; it is D", None, "A", None, "unresolved"),
    ("COL", "B", "The cup is red, so the answer is \\boxed{B", "B", "B", "B", "boxed_open_letter"),
    ("COL", "C", "\\boxed{B. blue}", "B", "B", None, "boxed_conflict"),
]]
