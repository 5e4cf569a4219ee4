"""The product runs on patched greenlets, and so does its test suite: patched before anything else is imported."""

from gevent import monkey

monkey.patch_all()
