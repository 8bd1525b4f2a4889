#!/usr/bin/env python3
"""The software bill of materials of a release, as SPDX 2.3 in JSON, on standard output: the
program, what its archive holds that others made, and what it needs where it runs. `make dist` calls
it; the same archive gives the same bytes.

    tests/make/sbom.py ARCHIVE
"""
import hashlib
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

archive = Path(sys.argv[1])
name, version = archive.name[:-len(".tar.gz")].split("-")
digest = hashlib.sha256(archive.read_bytes()).hexdigest()
committed = int(subprocess.check_output(["git", "log", "-1", "--format=%ct"]))


def package(key, name, version, licence, comment, **more):
    return {"SPDXID": "SPDXRef-" + key, "name": name, "versionInfo": version,
            "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
            "licenseConcluded": licence, "licenseDeclared": licence,
            "copyrightText": "NOASSERTION", "comment": comment, **more}


def related(one, kind, other):
    return {"spdxElementId": "SPDXRef-" + one, "relationshipType": kind,
            "relatedSpdxElement": "SPDXRef-" + other}


json.dump({
    "spdxVersion": "SPDX-2.3",
    "dataLicense": "CC0-1.0",
    "SPDXID": "SPDXRef-DOCUMENT",
    "name": archive.name,
    "documentNamespace": "https://spdx.org/spdxdocs/%s-%s-%s" % (name, version, digest),
    "creationInfo": {
        "created": datetime.fromtimestamp(committed, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "creators": ["Organization: the kl3m authors"]},
    "packages": [
        package("kl3m", name, version, "MIT", "The program, the exporter, their tests, and a small "
                "model trained for them. No code of others is in it.",
                packageFileName=archive.name,
                checksums=[{"algorithm": "SHA256", "checksumValue": digest}]),
        package("unicode", "Unicode Character Database", "16.0.0", "Unicode-3.0", "Classes of "
                "characters, and decompositions of those of version 9, as tables in tokenizer.c."),
        package("libc", "C library", "NOASSERTION", "NOASSERTION", "libc, libm and threads of the "
                "system that it is built on; nothing else is linked."),
        package("python", "Python", "3.9 or later", "PSF-2.0", "Runs export_weights.py, by its "
                "standard library alone; the program does without."),
    ],
    "relationships": [
        related("DOCUMENT", "DESCRIBES", "kl3m"),
        related("kl3m", "CONTAINS", "unicode"),
        related("kl3m", "DYNAMIC_LINK", "libc"),
        related("python", "OPTIONAL_DEPENDENCY_OF", "kl3m"),
    ],
}, sys.stdout, indent=2)
print()
