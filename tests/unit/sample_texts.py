"""Text of several scripts and kinds, for tests that need a trained tokenizer, and running the data tools."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

DATA_TOOLS = Path(__file__).parents[2] / "data_tools"

PROSE = [
    "The search is sharded over all ranks and merged to one exact answer.",
    "A tokenizer maps text to numbers, and the numbers back to the same text.",
    "Hard negatives are mined again and again while the model learns.",
    "Every document ends with one end-of-document token, even an empty one.",
    "In 2024 there were 1234567890 tokens, 3.14 of them round.",
]
MULTILINGUAL = [
    "我们用同样的词表处理中文文本。",
    "検索は全ての計算機に分散される。",
    "Поиск распределён по всем процессам.",
    "Größere Übergänge über die Straße, façade, naïve, coöperation.",
    "البحث موزع على جميع العمليات",
]
CODE = [
    "def merge(scores, ids):\n    order = np.lexsort((ids, -scores))\n\treturn scores[order]\n",
    "for (int i = 0; i < n; ++i) {\n        total += values[i];\n}\n",
]
DOCUMENTS = PROSE + MULTILINGUAL + CODE


def load_tool(name: str) -> ModuleType:
    """The script data_tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"data_tools_{name}", DATA_TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run data_tools/NAME.py as a user does."""
    command = [sys.executable, str(DATA_TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
