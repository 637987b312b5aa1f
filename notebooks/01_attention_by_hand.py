# %% [markdown]
# # Attention by hand
# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import matplotlib.pyplot as plt

from course import lesson

check, accepted, claim, score = lesson(1)
# %%
entries = ...
check("entries", entries)
plt.figure(figsize=(1, 1)); plt.plot([1, 2]); plt.show()
# %% [markdown]
# <details><summary>a</summary></details><details><summary>a</summary></details><details><summary>a</summary></details>
# <details><summary>a</summary></details><details><summary>a</summary></details>
