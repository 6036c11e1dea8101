"""Linear models need scikit-learn; the rest of torchreg does not."""

import subprocess
import sys


def test_importing_torchreg_does_not_import_scikit_learn_nor_the_figures_matplotlib() -> None:
    code = (
        "import sys, torchreg, torchreg.plots; early = {'sklearn', 'matplotlib'} & set(sys.modules); "
        "print(len(early), torchreg.linear.Lasso.__name__)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["0", "Lasso"]


def test_without_scikit_learn_it_is_said_what_to_install() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import torchreg; torchreg.linear"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: torchreg.linear needs scikit-learn: pip install 'torchreg-sparse[sklearn]'" in done.stderr
