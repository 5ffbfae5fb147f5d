"""Metadata is static in pyproject.toml; this file is where native extensions join the build."""

from setuptools import setup

setup()
