"""The man page, the completions and the source archive: what make makes of the program itself."""
import hashlib
import json
import re
import shutil
import subprocess
import sys

from harness import KL3M, ROOT, Skip, expect, run, run_kl3m, test, tmpdir


def pages():
    folder = tmpdir()
    subprocess.run([sys.executable, str(ROOT / "tests" / "make" / "pages.py"), str(KL3M),
                    str(folder)], check=True)
    return folder


def option_names():
    return re.findall(r"--([\w-]+)", "\n".join(
        line[:32] for line in run_kl3m("--help").text.splitlines() if line.startswith("  ")))


@test("the man page has every option of --help, with its help, and is sound")
def man_page():
    text = (pages() / "kl3m.1").read_text()
    plain = text.replace("\\-", "-").replace("\\fR", "").replace("\\fB", "").replace("\\fI", "")
    for name in option_names():
        assert "--" + name in plain, name
    assert plain.count("\n.TP\n") == len(option_names()) >= 45
    if shutil.which("groff"):
        done = run(["groff", "-man", "-Tutf8", "-ww", "-z"], input=text.encode())
        expect((done.code, done.err), (0, ""))


def bash_says(*words):
    """What bash completes the last word to, behind the others."""
    script = 'source "$1"; shift; COMP_WORDS=(kl3m "$@"); COMP_CWORD=$#; _kl3m; ' \
             'printf "%s\\n" "${COMPREPLY[@]}"'
    done = run(["bash", "-c", script, "bash", pages() / "kl3m.bash", *words])
    return done.text.split()


@test("bash completes options, their choices and files")
def bash():
    if shutil.which("bash") is None:
        raise Skip("bash is not installed")
    expect(sorted(bash_says("--sc")), sorted("--" + name for name in option_names()
                                            if name.startswith("sc")))
    expect(bash_says("--truncate", ""), ["left", "right"])
    expect(bash_says("--quantize", "q"), ["q8"])
    expect(bash_says("-p", ""), [])
    folder = tmpdir()
    (folder / "lease.txt").write_text("")
    expect(bash_says("-f", str(folder) + "/le"), [str(folder / "lease.txt")])


@test("zsh completes options and their choices")
def zsh():
    if shutil.which("zsh") is None:
        raise Skip("zsh is not installed")
    script = """
        fpath=($1 $fpath); zmodload zsh/zpty; export TERM=dumb
        zpty shell zsh -f -i
        zpty -w shell "PS1=; fpath=($1 \\$fpath); autoload -Uz compinit; compinit -D -u"
        zpty -w shell "echo rea''dy"
        zpty -r -m shell line '*ready*'
        zpty -n -w shell "$2"$'\\t'
        sleep 0.5; zpty -n -w shell $'\\t'
        for i in {1..600}; do
            sleep 0.05
            while zpty -r -t shell line; do print -r -- "$line"; all+=$line; done
            [[ $all == *$3* ]] && break
        done
        zpty -d shell
    """
    def said(text, last):
        return run(["zsh", "-f", "-c", script, "zsh", pages(), text, last]).text
    found = said("kl3m --sco", "--score")
    assert "--score" in found, found
    found = said("kl3m --truncate ", "right")
    assert "left" in found and "right" in found, found


@test("fish's completions are sound")
def fish():
    if shutil.which("fish") is None:
        raise Skip("fish is not installed")
    done = run(["fish", "--no-config", "-c", 'source $argv[1]; complete -C "kl3m --sco"',
                pages() / "kl3m.fish"])
    assert "--score" in done.text, done


@test("make install brings the man page and the completions, and uninstall takes everything away")
def installed():
    place = tmpdir() / "de st"
    def make(target):
        done = run(["make", "-s", "-C", ROOT, "OUT=%s" % KL3M, "MODEL=none.bin",
                    "PYTHON=%s" % sys.executable, "DESTDIR=%s" % place, "PREFIX=/usr", target])
        expect(done.code, 0, done.err)
        return sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
    expect(make("install"), ["usr/bin/kl3m", "usr/share/bash-completion/completions/kl3m",
                             "usr/share/fish/vendor_completions.d/kl3m.fish",
                             "usr/share/man/man1/kl3m.1",
                             "usr/share/zsh/site-functions/_kl3m"])
    expect(make("uninstall"), [])


@test("make dist writes what is committed, its checksum and its bill of materials, the same bytes each time")
def archive():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        raise Skip("this is no git checkout")
    found = []
    for _ in range(2):
        place = tmpdir() / "kl3m"
        done = run(["git", "clone", "-q", ROOT, place])
        expect(done.code, 0, done.err)
        done = run(["make", "-s", "-C", place, "PYTHON=%s" % sys.executable, "dist"])
        expect(done.code, 0, done.err)
        found.append({path.name: path.read_bytes() for path in place.glob("kl3m-*")})
    expect(found[0], found[1])
    name, digest = done.text.split()[1], done.text.split()[0]
    base = name[:-len(".tar.gz")]
    expect(sorted(found[0]), [base + ".spdx.json", name, name + ".sha256"])
    expect(hashlib.sha256(found[0][name]).hexdigest(), digest)
    expect(found[0][name + ".sha256"].decode(), "%s  %s\n" % (digest, name))
    bill = json.loads(found[0][base + ".spdx.json"])
    kl3m, = (p for p in bill["packages"] if p["name"] == "kl3m")
    expect((kl3m["versionInfo"], kl3m["checksums"][0]["checksumValue"]),
           (run_kl3m("--version").text.split()[1].rstrip(","), digest))
    listed = run(["tar", "-tzf", place / name]).text.split()
    assert base + "/kl3m.c" in listed and len(listed) > 20, listed
