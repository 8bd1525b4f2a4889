#!/usr/bin/env python3
"""Write the man page and the completions for bash, zsh and fish from what `kl3m --help` prints, so
that they cannot say anything else than the program's own table of options.

    tests/make/pages.py KL3M FOLDER

FOLDER gets kl3m.1, kl3m.bash, _kl3m and kl3m.fish. `make install` calls it.
"""
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

Option = namedtuple("Option", "letter name value help group")


def read_help(program):
    """([Option], the paragraph at the end, the program's version)."""
    def said(name):
        return subprocess.run([program, name], stdout=subprocess.PIPE, check=True,
                              universal_newlines=True).stdout
    options, group, rest = [], None, []
    for line in said("--help").splitlines()[4:]:
        match = re.match(r"  (?:-(.), |    )--([\w-]+)(?: (\S+))? +(.*)$", line)
        if match:
            options.append(Option(*match.groups(), group))
        elif re.fullmatch(r"[A-Z][\w ]*:", line):
            group = line[:-1]
        elif line:
            rest.append(line)
    return options, " ".join(rest), said("--version").split()[1].rstrip(",")


def choices(option):
    return option.value.split("|") if option.value and "|" in option.value else []


def roff(text):
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def man_page(options, rest, version):
    out = ['.TH KL3M 1 "" "kl3m %s" "User Commands"' % version, ".SH NAME",
           "kl3m \\- continue, score and structure legal text with KL3M language models",
           ".SH SYNOPSIS", ".B kl3m", "[\\fIoptions\\fR]", ".SH DESCRIPTION",
           "The prompt is TEXT of \\-p, the file of \\-f, or each line of standard input; its "
           "continuation goes to standard output. Results are the same to the last bit on every "
           "machine, for any number of threads and prompts."]
    group = None
    for option in options:
        if option.group != group:
            group = option.group
            out.append(".SH OPTIONS" if group == options[0].group else "")
            out.append('.SS "%s"' % group)
        names = ["\\fB\\-%s\\fR" % option.letter] if option.letter else []
        names.append("\\fB\\-\\-%s\\fR" % roff(option.name))
        value = " \\fI%s\\fR" % roff(option.value) if option.value else ""
        out += [".TP", ", ".join(names) + value, roff(option.help)]
    out += [".SH FILES AND EXIT STATUS", roff(rest), ".SH EXAMPLES", ".EX"]
    out += [roff(line) for line in (
        'kl3m -p "Governing Law.\\n" -t 0.3 -n 32',
        "kl3m -n 64 -s 1 < prompts.txt > texts.txt",
        "kl3m --score --json < texts.txt",
        'kl3m --schema clause.json -f clause.txt')]
    return "\n".join(line for line in out + [".EE"] if line) + "\n"


def bash_completion(options):
    names = " ".join(["--" + o.name for o in options]
                     + ["-" + o.letter for o in options if o.letter])
    cases = []
    for option in options:
        if not option.value:
            continue
        pattern = "--" + option.name + ("|-" + option.letter if option.letter else "")
        if choices(option):
            action = 'COMPREPLY=($(compgen -W "%s" -- "$word"))' % " ".join(choices(option))
        elif option.value == "FILE":
            action = 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$word"))'
        else:
            action = ":"
        cases.append("        %s) %s; return ;;" % (pattern, action))
    return """# bash completion for kl3m
_kl3m() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $before in
%s
    esac
    COMPREPLY=($(compgen -W "%s" -- "$word"))
}
complete -F _kl3m kl3m
""" % ("\n".join(cases), names)


def zsh_completion(options):
    lines = []
    for option in options:
        text = re.sub(r"([\[\]:\\])", r"\\\1", option.help).replace("'", "'\\''")
        action = ""
        if choices(option):
            action = ":%s:(%s)" % (option.name, " ".join(choices(option)))
        elif option.value:
            action = ":%s:%s" % (option.value, "_files" if option.value == "FILE" else " ")
        if option.letter:
            lines.append("    {-%s,--%s}'[%s]%s'" % (option.letter, option.name, text, action))
        else:
            lines.append("    '--%s[%s]%s'" % (option.name, text, action))
    return "#compdef kl3m\n_arguments -s \\\n%s\n" % " \\\n".join(lines)


def fish_completion(options):
    lines = ["# fish completion for kl3m", "complete -c kl3m -f"]
    for option in options:
        line = "complete -c kl3m -l %s" % option.name
        if option.letter:
            line += " -s %s" % option.letter
        if choices(option):
            line += " -x -a '%s'" % " ".join(choices(option))
        elif option.value:
            line += " -r -F" if option.value == "FILE" else " -x"
        quoted = option.help.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(line + " -d '%s'" % quoted)
    return "\n".join(lines) + "\n"


def main():
    program, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    options, rest, version = read_help(program)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("kl3m.1", man_page(options, rest, version)),
                       ("kl3m.bash", bash_completion(options)),
                       ("_kl3m", zsh_completion(options)),
                       ("kl3m.fish", fish_completion(options))):
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
