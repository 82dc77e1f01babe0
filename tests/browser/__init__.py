"""Tests in a real browser: JupyterLab driven through headless Chromium."""
