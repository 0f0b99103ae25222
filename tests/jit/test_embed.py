"""The build step that puts device text into the library keeps every character."""

import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "cmake" / "embed.cmake"
HARD = """// [ ]] [[ ]=] ; a;b;;c \\ \\\\ \\; " \\" \\n $ ${SCRIPT} $ENV{HOME} @SCRIPT@ # % ( ) R"( )" <> |\t\n\n  \n"""


def embed(output, *files):
    arguments = [f"-DOUTPUT={output}", f"-DFILES={';'.join(f'{file.parent}|{file.name}' for file in files)}"]
    return subprocess.run(["cmake", *arguments, "-P", SCRIPT], capture_output=True, text=True, check=False)


def test_text_is_kept(tmp_path):
    files = [tmp_path / "b.cuh", tmp_path / "a.cu", tmp_path / "empty.cu"]
    for file, text in zip(files, [HARD, HARD * 3, ""], strict=True):
        file.write_text(text)
    done = embed(tmp_path / "out.cc", *files)
    assert done.returncode == 0, done.stderr
    out = (tmp_path / "out.cc").read_text()
    for name, text in (("b.cuh", HARD), ("a.cu", HARD * 3), ("empty.cu", "")):
        assert f'{{"{name}", R"vicus({text})vicus"}}' in out


def test_text_that_would_end_the_literal_is_refused(tmp_path):
    file = tmp_path / "a.cu"
    file.write_text('// )vicus" //')
    done = embed(tmp_path / "out.cc", file)
    assert done.returncode != 0
    assert "a.cu" in done.stderr
