"""What pyproject.toml cannot say: the folder kernels/ is installed as the package mekd.kernels."""

from setuptools import find_packages, setup

packages = [*find_packages(include=["mekd", "mekd.*"]), "mekd.kernels"]
setup(packages=packages, package_dir={"mekd": "mekd", "mekd.kernels": "kernels"})
