#!/bin/sh
# Install the packages for rendering without a screen if possible, otherwise name them. Never fails, because the demo and
# the tests also work, with limits, without rendering.
#
#     sh scripts/install_opengl.sh .venv/bin/python     # the Python that will render

packages="libegl1 libgl1-mesa-dri libopengl0 libgl1 libglib2.0-0" # the last two are for OpenCV, which LIBERO imports

renders() {
	MUJOCO_GL=egl "$1" -c "from mujoco.egl import GLContext; GLContext(8, 8).free()
import ctypes; ctypes.CDLL('libGL.so.1'); ctypes.CDLL('libglib-2.0.so.0')" >/dev/null 2>&1
}

[ "$(uname)" = Linux ] || exit 0 # other systems include OpenGL
case "${MUJOCO_GL:-egl}" in
[eE][gG][lL]) ;;
*) exit 0 ;; # another backend was chosen
esac
renders "$1" && exit 0

if [ "$(id -u)" = 0 ]; then
	sudo=""
elif sudo -n true 2>/dev/null; then
	sudo="sudo -n"
else
	sudo=none
fi
if [ "$sudo" != none ] && command -v apt-get >/dev/null; then
	echo "Installing $packages for rendering without a screen"
	options="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=120"
	# A failed update, for example of one of several sources, may still leave usable package lists.
	$sudo apt-get $options update
	$sudo env DEBIAN_FRONTEND=noninteractive apt-get $options install --yes --no-install-recommends $packages
	renders "$1" && exit 0
fi
echo "Rendering without a screen needs OpenGL through EGL; on Debian and Ubuntu: apt-get install $packages. Continuing without it." >&2
