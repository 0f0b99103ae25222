"""CUDA C++ of src/gpu as C++ of the host: `translated` for a file, `entry` for the kernel in it.

What the language adds to C++ is in cuda.h. What is left are declarations of shared memory, and PTX: every instruction
of an asm statement becomes a call of the function of that name in ptx.h, with the operands in the order of its text, so
that the wrappers' own text is what runs.
"""

import re

STRING = r'"(?:[^"\\]|\\.)*"'
ASM = re.compile(r"\basm\b(?:\s+volatile)?\s*\(")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')
# Operands of an instruction: %0, registers of its own, numbers; brackets say where an address is, which types say here.
TOKEN = re.compile(r"%\d+|\w+|[{},\[\]]")


class Untranslatable(Exception):
    pass


def closing(text: str, start: int) -> int:
    """Where the parenthesis that is open before `start` closes, strings aside."""
    depth = 1
    for token in re.finditer(rf"{STRING}|[()]", text[start:]):
        depth += {"(": 1, ")": -1}.get(token.group(), 0)
        if depth == 0:
            return start + token.start()
    raise Untranslatable(f"a parenthesis is open to the end: {text[start : start + 80]}")


def operands(section: str) -> list[str]:
    """The expressions of '"=r"(x), "r"(y)'."""
    found, at = [], 0
    while match := re.compile(rf"\s*,?\s*{STRING}\s*\(").match(section, at):
        at = closing(section, match.end())
        found.append(section[match.end() : at].strip())
        at += 1
    return found


def sections(text: str) -> list[str]:
    """The parts of an asm statement, which colons divide: its text, outputs, inputs, what it clobbers."""
    parts, depth, at = [""], 0, 0
    for token in re.finditer(rf"{STRING}|[()]|:|[^\"():]+", text):
        piece = token.group()
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if piece == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
        at = token.end()
    if text[at:].strip():
        raise Untranslatable(f"an asm statement ends in {text[at:]}")
    return parts


def call(instruction: str, values: list[str]) -> str:
    name, _, rest = instruction.partition(" ")
    if name.startswith("@"):
        return f"if ({name[1:]}) {call(rest, values)}"
    if name == ".reg":
        return f"bool {rest.split()[1]} = false;"
    columns = re.search(r"m64n(\d+)k16", name)
    name = re.sub(r"(?<=m64)n\d+(?=k16)", "", name)
    arguments = ""
    for token in TOKEN.findall(rest):
        if token.startswith("%"):
            arguments += f"({values[int(token[1:])]})"
        elif token in "[]":
            continue
        else:
            arguments += {"{": "ptx::list(", "}": ")", "_": "ptx::unused", ",": ", "}.get(token, token)
    shape = f"<{columns.group(1)}>" if columns else ""
    return f"ptx::{re.sub(r'[.:]+', '_', name)}{shape}({arguments});"


def statement(text: str) -> str:
    """What stands between the parentheses of asm."""
    code, *rest = sections(text)
    values = [value for section in rest[:2] for value in operands(section)]
    ptx = "".join(literal[1:-1] for literal in re.findall(STRING, code))
    ptx = re.sub(r"//[^\n]*", "", ptx.replace("\\n", "\n")).strip()
    if ptx.startswith("{\n"):
        ptx = ptx.removeprefix("{").removesuffix("}")
    instructions = [" ".join(line.split()) for line in ptx.split(";") if line.strip()]
    return "{ " + " ".join(call(instruction, values) for instruction in instructions) + " }"


def translated(text: str) -> str:
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?unsigned char (\w+)\[\];",
        r"unsigned char* const \1 = emulation::place.shared;",
        text,
    )
    text = re.sub(r"\b__shared__\b", "static", text)
    text = text.replace("1.0f / 0.0f", "__builtin_huge_valf()")  # which is no constant in C++
    made, at = "", 0
    while match := ASM.search(text, at):
        end = closing(text, match.end())
        made += text[at : match.start()] + statement(text[match.end() : end])
        at = end + 1
        if text[at : at + 1] == ";":
            at += 1
    return made + text[at:]


def entry(text: str) -> str:
    """Functions around the one kernel of all these files, for the driver: how to call it, how long its argument is."""
    kernels = KERNEL.findall(text)
    if len(kernels) != 1:
        raise Untranslatable(f"there are {len(kernels)} kernels, not one")
    name, parameters = kernels[0]
    kind = re.fullmatch(r"\s*const\s+__grid_constant__\s+(\w+)\s+\w+\s*", parameters)
    if not kind:
        raise Untranslatable(f"{name} has the parameters {parameters}")
    kind = f"vicus::gpu::{kind.group(1)}"
    return f"""
#pragma GCC visibility push(default)
extern "C" void emulated_{name}(const void* args) {{ vicus::gpu::{name}(*static_cast<const {kind}*>(args)); }}
extern "C" unsigned long emulated_{name}_bytes() {{ return sizeof({kind}); }}
#pragma GCC visibility pop
"""
