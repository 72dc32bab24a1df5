"""Everything about the package stands in settings.ini; this file hands it to setuptools, and puts the notebooks into the wheel."""
import os
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {key.removeprefix("extra_"): value.split() for key, value in cfg.items() if key.startswith("extra_")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
extras["dev"] = cfg["dev_requirements"].split()


class BuildWithNotebooks(build_py):
    """Puts the notebooks, their pictures and settings.ini into the package that is built, as researchkit/_repository/.

    An editable install is left as it is: it finds those of the clone.
    """

    def notebooks(self) -> list[str]:
        "What goes along, as paths from here; without checkpoints, results of runs, and hidden files."
        found = sorted(p.relative_to(here) for kind in ("*.ipynb", "*.svg") for p in (here / "nbs").rglob(kind))
        return ["settings.ini", *(str(p) for p in found if not any(part == "runs" or part.startswith((".", "_")) for part in p.parts))]

    def placed(self) -> dict[str, str]:
        "Where each of them goes, and where it comes from."
        if getattr(self, "editable_mode", False):
            return {}
        return {os.path.join(self.build_lib, "researchkit", "_repository", path): path for path in self.notebooks()}

    def run(self):
        super().run()
        for target, source in self.placed().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_outputs(self, *args, **kwargs):
        return [*super().get_outputs(*args, **kwargs), *self.placed()]

    def get_output_mapping(self):
        return {**super().get_output_mapping(), **self.placed()}

    def get_source_files(self):
        return [*super().get_source_files(), *self.notebooks()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="MIT",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["researchkit", "researchkit.*"]),
    include_package_data=True,
    cmdclass={"build_py": BuildWithNotebooks},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
