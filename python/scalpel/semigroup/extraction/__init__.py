"""Extraction of finite machines from models."""
