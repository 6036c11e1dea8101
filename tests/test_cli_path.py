"""``torchreg path``: the coefficients over the strength, and the strengths that the folds choose."""

import csv
import io
import json
import os
import stat

import numpy as np
import pytest
from command import assert_refused, run_json

from torchreg.cli import main

pytest.importorskip("sklearn")

HEAD = "age,dose,answer\n"
ROWS = [(x, (7 * x) % 10, 3 * x - (7 * x) % 10 + (x % 3)) for x in range(20)]
BODY = "".join(f"{a},{b},{c}\n" for a, b, c in ROWS)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def found(*arguments):
    return run_json(["path", "--no-figure", *map(str, arguments)])


def test_the_path_is_that_of_the_solver_and_its_choices_those_of_the_rule(at_home):
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Lasso
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.preprocessing import StandardScaler

    document = found("--alphas", 20, "--seed", 3)
    x, y = load_diabetes(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    for i in (5, 19):
        lasso = Lasso(alpha=document["alphas"][i], tol=1e-12, max_iter=100_000)
        assert np.allclose(lasso.fit(x, y).coef_, document["standardised"][i], atol=1e-6)
        folds = KFold(5, shuffle=True, random_state=3)
        error = -cross_val_score(lasso, x, y, cv=folds, scoring="neg_mean_squared_error")
        assert error.mean() == pytest.approx(document["mean_squared_error"][i], rel=1e-9)
        assert error.std(ddof=1) / 5**0.5 == pytest.approx(document["standard_error"][i], rel=1e-9)
    best, simple = (document["choices"][name] for name in ("least_error", "one_standard_error"))
    assert best["mean_squared_error"] == min(document["mean_squared_error"])
    bound = best["mean_squared_error"] + document["standard_error"][document["alphas"].index(best["alpha"])]
    within = [a for a, e in zip(document["alphas"], document["mean_squared_error"], strict=True) if e <= bound]
    assert simple["alpha"] == max(within)
    assert len(simple["features"]) < len(best["features"])


def test_the_files_predict_in_the_units_of_the_data(at_home):
    path = saved(at_home / "trial.csv", HEAD + BODY)
    assert (
        main(["path", "--data", str(path), "--out", "out", "--no-figure", "--alphas", "30", "--l1-ratio", "0.8"]) == 0
    )
    assert sorted(os.listdir("out")) == ["path.csv", "path.json"]
    rows = list(csv.DictReader(io.StringIO((at_home / "out/path.csv").read_text())))
    document = json.loads((at_home / "out/path.json").read_text())
    assert list(rows[0])[-2:] == ["age", "dose"]
    assert [float(row["alpha"]) for row in rows] == document["alphas"]
    weak = rows[-1]
    for age, dose, answer in ROWS[:5]:
        guess = float(weak["intercept"]) + age * float(weak["age"]) + dose * float(weak["dose"])
        assert guess == pytest.approx(answer, abs=3)
    assert rows[0]["nonzero"] == "0"
    assert document["entered_at"][0] > document["entered_at"][1]


def test_the_table_and_the_figure(at_home, capsys):
    pytest.importorskip("matplotlib")
    assert main(["path", "--data", "diabetes", "--out", "new/out", "--alphas", "20"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("diabetes: target from 10 features (each divided by its standard deviation), 442 rows\nLasso")
    assert "bmi" in out
    assert "features used" in out
    assert (at_home / "new/out/path.png").read_bytes().startswith(b"\x89PNG")


def test_the_conclusion_says_what_the_folds_can_tell(at_home, capsys):
    def said(y, *options):
        np.savez("data.npz", X=x, y=y)
        assert main(["path", "--data", "data.npz", "--no-figure", "--alphas", "30", *options]) == 0
        return " ".join(capsys.readouterr().out.split())

    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4))
    assert "can't tell that the features predict anything" in said(rng.standard_normal(60))
    assert "2 of 4 features; no stronger penalty is within" in said(x[:, 0] - x[:, 1], "--eps", "0.1")
    one = [word for name in ("x2", "x3", "x4") for word in ("--drop", name)]
    assert "One with as many, but smaller coefficients, is within" in said(x[:, 0] + rng.standard_normal(60), *one)


def test_wide_tables_are_shown_in_part(at_home, capsys):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 300))
    np.savez("wide.npz", X=x, y=x[:, :3].sum(1), names=np.array([f"gene {i}" for i in range(300)]))
    assert main(["path", "--data", "wide.npz", "--no-figure", "--alphas", "20", "--folds", "3"]) == 0
    out, _ = capsys.readouterr()
    assert "gene 0" in out
    assert "more, " in out
    assert out.count("gene") <= 40


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (BODY, "utf-8"),
        (HEAD + BODY, "utf-8-sig"),
        (HEAD.replace(",", ";") + BODY.replace(",", ";"), "utf-8"),
        (HEAD.replace(",", "\t") + BODY.replace(",", "\t"), "utf-8"),
        ('"age","dose, in mg","answer"\n' + BODY.replace("\n", "\r\n"), "utf-8"),
        (HEAD + "\n" + BODY + "\n\n", "utf-8"),
    ],
    ids=["no names", "byte order mark", "semicolons", "tabs", "quotes and CRLF", "blank lines"],
)
def test_dialects_of_csv(text, encoding, at_home):
    path = saved(at_home / "a.csv", text, encoding)
    document = found("--data", path, "--alphas", 5)
    assert document["data"]["rows"] == 20
    assert document["data"]["features"][0] in {"age", "x1"}


def test_columns_are_named_numbered_and_dropped(at_home):
    path = saved(
        at_home / "a.csv", "id,age,dose,answer\n" + "".join(f"n{i},{row}\n" for i, row in enumerate(BODY.split()))
    )
    for target in ("dose", "3", "-2"):
        document = found("--data", path, "--drop", "id", "--target", target, "--alphas", 5)
        assert document["data"]["target"] == "dose"
        assert document["data"]["features"] == ["age", "answer"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (HEAD, "no rows"),
        (HEAD + BODY + "1,2\n", "line 22: expected 3 values"),
        (HEAD + BODY + "1,,3\n", "line 22: column 'dose' is empty"),
        (HEAD + "1,NA,3\n" + BODY, "line 2: column 'dose' holds 'NA'"),
        (HEAD + BODY + "1,nan,3\n", "'nan', which is no finite number"),
        (HEAD + BODY + "1,1e999,3\n", "'1e999'"),
        (HEAD + BODY + "1_0,1,3\n", "'1_0'"),
        ("a,a,b\n" + BODY, "two columns 'a'"),
        ("answer\n" + "".join(f"{i}\n" for i in range(20)), "no column to predict 'answer' with"),
        (HEAD + "".join(f"{a},{b},5\n" for a, b, _ in ROWS), "'answer' is constant"),
        (HEAD + "".join(f"1,2,{c}\n" for _, _, c in ROWS), "no column is correlated"),
        (HEAD + BODY[:30], "5 folds need 10 rows"),
        (HEAD + "".join(f"{a}e200,{b},{c}e200\n" for a, b, c in ROWS), "too large"),
        (HEAD + 'a"b"c,"x\n' + BODY, "can't be read"),
        (HEAD + BODY + "\0,\0,\0\n", "a.csv"),
        ("x" * 200_000 + "," + HEAD + BODY, "can't be read: field larger"),
    ],
)
def test_bad_csv_files_are_refused_in_one_line(text, words, at_home, capsys):
    path = saved(at_home / "a.csv", text)
    assert_refused(capsys, ["path", "--no-figure", "--data", path, "--out", "out"], words)
    assert not (at_home / "out").exists()


def test_other_bad_files_are_refused(at_home, capsys):
    def refused(path, *words):
        assert_refused(capsys, ["path", "--no-figure", "--data", path, "--out", "out"], *words)

    refused("absent.csv", "does not exist", "breast_cancer")
    refused(at_home, "is a directory")
    (at_home / "b.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    refused("b.csv", "UTF-8")
    (at_home / "c.npz").write_bytes(b"PK\x03\x04 torn")
    refused("c.npz", "not an .npz file")
    x, y = np.ones((20, 2)), np.arange(20.0)
    bad = {
        "has no array y": {"X": x},
        "X must have the shape": {"X": y, "y": y},
        "y must have the shape": {"X": x, "y": x},
        "X has 20 samples but y has 19": {"X": x, "y": y[:-1]},
        "X holds NaN": {"X": np.full((20, 2), np.nan), "y": y},
        "y must hold real numbers": {"X": x, "y": y.astype(complex)},
        "names must hold 2 strings": {"X": x, "y": y, "names": np.array(["a"])},
        "can't be read": {"X": x, "y": np.array([None] * 20)},
    }
    for words, arrays in bad.items():
        np.savez("d.npz", **arrays)
        refused("d.npz", words)
    assert not (at_home / "out").exists()


def test_bad_arguments_are_refused_before_anything_is_written(at_home, capsys):
    path = saved(at_home / "a.csv", HEAD + BODY)
    for arguments, words in [
        (["--target", "colour"], "no column 'colour'; there are age, dose, answer"),
        (["--target", "4"], "no column '4'"),
        (["--target", "0"], "no column '0'"),
        (["--drop", "answer"], "'answer' is the target"),
        (["--drop", "x"], "--drop: no column 'x'"),
        (["--l1-ratio", "0"], "--l1-ratio"),
        (["--l1-ratio", "nan"], "--l1-ratio"),
        (["--folds", "1"], "--folds: expected at least 2"),
        (["--folds", "30"], "30 folds need 60 rows"),
        (["--alphas", "1"], "--alphas"),
        (["--alphas", "99999"], "--alphas: expected at most 10000"),
        (["--eps", "0"], "--eps"),
        (["--seed", "-1"], "--seed"),
    ]:
        assert_refused(capsys, ["path", "--no-figure", "--data", path, "--out", "out", *arguments], words)
    assert_refused(capsys, ["path", "--no-figure", "--data", "iris"], "--target: say which column", "petal width")
    assert sorted(os.listdir()) == ["a.csv"]


def test_files_that_are_there_are_not_replaced(at_home, capsys):
    path = saved(at_home / "a.csv", HEAD + BODY)
    saved(at_home / "path.csv", "mine")
    assert_refused(capsys, ["path", "--no-figure", "--data", path, "--out", at_home], "--out", "already holds path.csv")
    assert (at_home / "path.csv").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user for whom folders can be read-only")
def test_a_folder_that_takes_no_files_is_refused(at_home, capsys):
    path = saved(at_home / "a.csv", HEAD + BODY)
    (at_home / "locked").mkdir()
    (at_home / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert_refused(capsys, ["path", "--no-figure", "--data", path, "--out", "locked"], "can't be written")


def test_constant_columns_get_no_coefficient_and_scales_do_not_matter(at_home):
    rows = "".join(f"{1e-9 * a},{1e9 * b},0.1,{c}\n" for a, b, c in ROWS)
    tiny = found("--data", saved(at_home / "a.csv", "a,b,constant,y\n" + rows), "--alphas", 10)
    plain = found("--data", saved(at_home / "b.csv", "a,b,y\n" + BODY), "--alphas", 10)
    assert [row[2] for row in tiny["standardised"]] == [0] * 10
    assert np.allclose([row[:2] for row in tiny["standardised"]], plain["standardised"], rtol=1e-6)
    assert np.allclose(1e-9 * np.array(tiny["coefficients"])[:, 0], np.array(plain["coefficients"])[:, 0], rtol=1e-6)


def test_names_cannot_write_to_the_terminal(at_home, capsys):
    path = saved(at_home / "a.csv", "a\x1b[31m,$\\alpha$,y\n" + BODY)
    assert main(["path", "--data", str(path), "--out", "out", "--alphas", "5"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\\x1b[31m" in out
