"""A traceback is for bugs, a line is for what a person can mend."""

import json
import os
import runpy
from typing import Any

import pytest

from mlp_mixer import errors, program, recipe

# What a line of our code may do → what Python says of it.
BUGS: dict[str, type[Exception]] = {
    "{}['key']": KeyError,
    "[][3]": IndexError,
    "None.attribute": AttributeError,
    "len(3)": TypeError,
    "nowhere": NameError,
    "1 // 0": ZeroDivisionError,
    "1 % 0": ZeroDivisionError,
    "int('x')": ValueError,
    "float('x')": ValueError,
    "a, b = [1]": ValueError,
    "list(zip([1], [], strict=True))": ValueError,
    "[].index(1)": ValueError,
    "b'\\xff'.decode()": UnicodeDecodeError,
    "__import__('json').loads('{')": json.JSONDecodeError,
    "__import__('struct').unpack('<i', b'')": Exception,
    "next(iter([]))": StopIteration,
    "import nowhere": ImportError,
    "from os import nowhere": ImportError,
    "del nowhere": NameError,
    "10**5000 == str(10**5000)": ValueError,
    "exec('raise')": RuntimeError,
    "(lambda f: f(f))(lambda f: f(f))": RecursionError,
    "raise ValueError": ValueError,  # without a word
    "open('a', 'nomode')": ValueError,
}


def failing(code, name="mlp_mixer.made"):
    """The error of a module of ours with this line."""
    space = {"__name__": name}
    exec(compile(f"def f():\n  {code}\n", "made.py", "exec"), space)
    call: Any = space["f"]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


@pytest.mark.parametrize("code", BUGS)
def test_what_python_raises_in_our_code_keeps_its_traceback(code):
    error = failing(code)
    assert isinstance(error, BUGS[code])
    assert errors.message(error) is None
    with pytest.raises(type(error)), program.errors_in_one_line():
        raise error


ON_PURPOSE = [
    "raise ValueError('said')",
    "raise KeyError('said') from KeyError('other')",
    """try: int('x')
  except ValueError as error: raise ValueError('said') from error""",
    """try: raise ValueError('said')
  finally: pass""",
    """try: raise ValueError('said')
  except ValueError: raise""",
    """with __import__('contextlib').suppress(KeyError): raise ValueError('said')""",
]


@pytest.mark.parametrize("code", ON_PURPOSE)
def test_what_we_raise_on_purpose_is_said_alone(code):
    error = failing(code)
    assert errors.message(error) == str(error)
    with pytest.raises(SystemExit, match="said"), program.errors_in_one_line():
        raise error.with_traceback(error.__traceback__)


def test_a_library_that_raises_on_purpose_keeps_its_traceback():
    error = failing("raise ValueError('said')", name="library")
    assert errors.message(error) is None
    assert errors.message(error, ["library"]) == "said"
    assert errors.message(failing("raise ValueError('x')", "mlp_mixers")) is None


def test_a_reraised_bug_is_a_bug():
    code = """try: int('x')
  except ValueError: raise"""
    assert errors.message(failing(code)) is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open('{0}/none')", "{0}/none: No such file or directory."),
        ("open('{0}')", "{0}: Is a directory."),
        ("__import__('os').listdir('{0}/file')", "{0}/file: Not a directory."),
        ("__import__('pathlib').Path('{0}/none').read_text()", "{0}/none: No such fi"),
        ("__import__('os').rename('{0}/a', '{0}/b')", "{0}/a → {0}/b: No such file"),
        ("__import__('os').open(b'{0}/a', 0)", "{0}/a: No such file"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
    ],
)
def test_the_system_names_the_file_itself(code, expected, tmp_path):
    (tmp_path / "file").touch()
    error = failing(code.format(tmp_path))
    assert (errors.message(error) or "").startswith(expected.format(tmp_path))


def test_a_full_disk_is_said_wherever_it_is_noticed():
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:  # noqa: PT011
        full.write(b"x")
    assert errors.message(caught.value) == "No space left on device."


@pytest.mark.parametrize("code", ["int('x')", "{}['key']", "nowhere"])
def test_a_bug_of_a_recipe_keeps_its_traceback(code, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n  return {code}\n")
    with pytest.raises(BUGS[code]) as caught:
        recipe.load(str(path))
    assert errors.message(caught.value) is None
    path.write_text("def get_config():\n  raise KeyError('said')\n")
    with pytest.raises(KeyError) as said:
        runpy.run_path(str(path))["get_config"]()
    assert errors.message(said.value) == "'said'"


def test_paths_that_are_no_text_can_be_said():
    with pytest.raises(FileNotFoundError) as caught:
        os.listdir(os.fsdecode(b"/nowhere/\xff"))
    assert (errors.message(caught.value) or "").endswith(": No such file or directory.")


def test_an_error_that_names_something_from_outside_commands_no_terminal():
    error = failing(r"raise ValueError('no \x1b[31mred\x9b\n  second line')")
    with pytest.raises(SystemExit) as ended, program.errors_in_one_line():
        raise error
    assert ended.value.code == "no \\x1b[31mred\\x9b\n  second line"
    with pytest.raises(SystemExit) as ended:
        program._parse(["program", "--\x1b]0;x\x07"])
    assert str(ended.value.code).startswith(r"Unknown command line flag '\x1b]0;x\x07'")


def test_a_word_that_is_no_flag_is_not_passed_over():
    program.check_no_words([])
    for word in ("config.seed=3", "real", "runs/digits"):
        with pytest.raises(ValueError, match=f"'{word}' is no flag"):
            program.check_no_words([word, "more"])
