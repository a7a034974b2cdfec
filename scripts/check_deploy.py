#!/usr/bin/env python3
"""Checks what is in deploy/: the manifests' fields against schemas, and the batch script's syntax.

    python scripts/check_deploy.py
    python scripts/check_deploy.py --schemas DIR

DIR has the schemas of the kinds that are not Kubernetes' own, as custom resource definitions (.yaml) or OpenAPI documents (.json, with "definitions"). From a
cluster that has Kubeflow's operators:

    kubectl get crd trainjobs.trainer.kubeflow.org clustertrainingruntimes.trainer.kubeflow.org mpijobs.kubeflow.org -o yaml > DIR/crds.yaml
    kubectl get --raw /openapi/v2 > DIR/kubernetes.json      # everything, Kubernetes' own kinds too

A field that a schema does not have is an error, as is a value of another type. Without a schema only the form of a manifest is checked. Needs PyYAML, and
jsonschema for --schemas; shellcheck is run where it is installed.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent / "deploy"
# Kubernetes' types that are written as a text or a number.
SCALARS = {"Quantity": ["string", "number"], "IntOrString": ["string", "integer"], "Time": ["string"], "MicroTime": ["string"]}


class Schemas:
    """Schemas by the end of a kind's name: (group's first word or "", version, kind)."""

    def __init__(self, folder):
        self.kinds = {}
        self.definitions = {}
        if folder is None:
            return
        for path in sorted(folder.iterdir()):
            if path.suffix == ".json":
                self.definitions.update(json.loads(path.read_text())["definitions"])
            elif path.suffix in (".yaml", ".yml"):
                for document in yaml.safe_load_all(path.read_text()):
                    self.add_crds(document)
        for name, schema in self.definitions.items():
            for kind in schema.get("x-kubernetes-group-version-kind", []):
                self.kinds[kind["group"], kind["version"], kind["kind"]] = schema

    def add_crds(self, document):
        for crd in (document or {}).get("items", [document]):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                key = spec["group"], version["name"], spec["names"]["kind"]
                self.kinds[key] = version["schema"]["openAPIV3Schema"]

    def of(self, manifest):
        group, _, version = manifest["apiVersion"].rpartition("/")
        kind = manifest["kind"]
        found = self.kinds.get((group, version, kind))
        if found is None:
            # Documents for generators of clients name a kind by its version alone.
            found = self.definitions.get(f"{version}.{kind}")
        return None if found is None else self.strict(found)

    def strict(self, schema, above=()):
        """The schema for jsonschema, with references resolved, where a field that is not named is an error."""
        if "$ref" in schema:
            name = schema["$ref"].rsplit("/", 1)[-1]
            short = name.rsplit(".", 1)[-1]
            if short in SCALARS:
                return {"type": SCALARS[short]}
            target = self.definitions.get(name)
            if target is None:
                # A document of one project names Kubernetes' types without their package.
                ends = [full for full in self.definitions if full.endswith("." + name)]
                target = self.definitions[ends[0]] if len(ends) == 1 else None
            if target is None or name in above:
                return {}
            return self.strict(target, (*above, name))
        if schema.get("x-kubernetes-int-or-string"):
            return {"type": ["string", "integer"]}
        strict = {key: schema[key] for key in ("type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "maxItems") if key in schema}
        if "anyOf" in schema and "type" not in schema:
            parts = [part for part in schema["anyOf"] if part.get("type") != "null"]
            if len(parts) == 1:
                return self.strict(parts[0], above)
            strict["anyOf"] = [self.strict(part, above) for part in parts]
        if "items" in schema:
            strict["items"] = self.strict(schema["items"], above)
        if "properties" in schema:
            strict["properties"] = {name: self.strict(part, above) for name, part in schema["properties"].items()}
            if not schema.get("x-kubernetes-preserve-unknown-fields"):
                strict["additionalProperties"] = False
        elif isinstance(schema.get("additionalProperties"), dict):
            strict["additionalProperties"] = self.strict(schema["additionalProperties"], above)
        return strict


def problems_of(manifest, schemas):
    """What is wrong with a manifest, and whether there was a schema for it."""
    if not isinstance(manifest, dict):
        return ["it is no mapping"], False
    missing = [key for key in ("apiVersion", "kind") if not isinstance(manifest.get(key), str)]
    if not (manifest.get("metadata") or {}).get("name"):
        missing.append("metadata.name")
    if missing:
        return [f"{key} is missing" for key in missing], False
    schema = schemas.of(manifest)
    if schema is None:
        return [], False
    import jsonschema

    # A custom resource's schema leaves the metadata to Kubernetes.
    schema.get("properties", {}).pop("metadata", None)
    body = {key: value for key, value in manifest.items() if key != "metadata"}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(body)
    return [f"{'.'.join(map(str, error.absolute_path)) or 'top'}: {error.message[:200]}" for error in errors], True


def check_manifests(schemas):
    failed = 0
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            problems, has_schema = problems_of(manifest, schemas)
            failed += len(problems)
            name = f"{path.name}: {manifest.get('kind')}" if isinstance(manifest, dict) else path.name
            state = "fails" if problems else "fits its schema" if has_schema else "no schema; its form is right"
            print(f"{name}: {state}")
            for problem in problems:
                print(f"  {problem}")
    return failed


def check_scripts():
    failed = 0
    for path in sorted((DEPLOY / "slurm").glob("*.sbatch")):
        commands = [["bash", "-n", str(path)]]
        if shutil.which("shellcheck"):
            commands.append(["shellcheck", str(path)])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(f"{path.name}: {command[0]} {'fails' if done.returncode else 'finds nothing'}")
            if done.returncode:
                failed += 1
                print(done.stdout + done.stderr)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--schemas", type=pathlib.Path, metavar="DIR", help="custom resource definitions and OpenAPI documents")
    schemas = Schemas(parser.parse_args().schemas)
    failed = check_manifests(schemas) + check_scripts()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
