import pytest
from mmkv_scores._settings import check_kernel


@pytest.mark.parametrize("kernel", [-1, 0, 2, 6])
def test_check_kernel(kernel):
    with pytest.raises(ValueError, match=f"Name: the kernel must be odd and positive, got {kernel}"):
        check_kernel(kernel, "Name")
