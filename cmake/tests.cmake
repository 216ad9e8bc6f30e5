# Registers tests. Labels: unit kernel golden e2e fault fuzz gpu slow web.

# spurion_add_test(NAME test_arena LABEL unit TIMEOUT 30 SOURCES test_arena.c LIBS spurion_base): a cmocka program.
function(spurion_add_test)
  cmake_parse_arguments(A "" "NAME;LABEL;TIMEOUT" "SOURCES;LIBS;ENV" ${ARGN})
  add_executable(${A_NAME} ${A_SOURCES})
  target_link_libraries(${A_NAME} PRIVATE ${A_LIBS} cmocka)
  add_test(NAME ${A_NAME} COMMAND ${A_NAME} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${A_NAME} PROPERTIES LABELS ${A_LABEL} TIMEOUT ${A_TIMEOUT} ENVIRONMENT "${A_ENV}")
endfunction()

# spurion_add_pytest(NAME golden_stored LABEL golden TIMEOUT 300 FILE test_stored.py): real processes driven by pytest.
# A file that skips itself whole (pytest's status 5) is shown as skipped. SPURION_PYTHON names the interpreter (one with PyTorch and the judges where they are installed).
set(SPURION_PYTHON "python3" CACHE STRING "Python interpreter for tests")
function(spurion_add_pytest)
  cmake_parse_arguments(A "" "NAME;LABEL;TIMEOUT;FILE" "ENV;ARGS" ${ARGN})
  add_test(NAME ${A_NAME} COMMAND ${SPURION_PYTHON} -m pytest -q -rs -p no:cacheprovider ${CMAKE_CURRENT_SOURCE_DIR}/${A_FILE} ${A_ARGS}
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${A_NAME} PROPERTIES LABELS ${A_LABEL} TIMEOUT ${A_TIMEOUT} SKIP_RETURN_CODE 5 ENVIRONMENT
    "SPURION_BIN=${CMAKE_BINARY_DIR}/bin;SPURIOND=${CMAKE_BINARY_DIR}/bin/spuriond;SPURION_PROBE=${CMAKE_BINARY_DIR}/bin/spurion-probe;SPURION_TOKENIZE=${CMAKE_BINARY_DIR}/bin/spurion-tokenize;SPURION_RENDER=${CMAKE_BINARY_DIR}/bin/spurion-render;SPURION_SOURCE=${CMAKE_SOURCE_DIR};SPURION_BUILD=${CMAKE_BINARY_DIR};OMP_WAIT_POLICY=passive;PYTHONDONTWRITEBYTECODE=1;${A_ENV}")
endfunction()
